"""The flavour of compiled engines, which a release may lack: lies apart, so that a test can leave it out."""

from tensorrt_llm.llmapi.llm import _TrtLLM as LLM

__all__ = ["LLM"]
