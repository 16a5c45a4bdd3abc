"""The library's public names that lem_kit uses, and what they are made of."""

from ..executor import CompletionOutput, RequestError, RequestOutput
from ..sampling_params import SamplingParams
from .llm import LLM
from .llm_args import (
    BuildCacheConfig,
    BuildConfig,
    CalibConfig,
    KvCacheConfig,
    LlmArgs,
    QuantAlgo,
    QuantConfig,
    TorchLlmArgs,
    TrtLlmArgs,
)

__all__ = [
    "LLM",
    "BuildCacheConfig",
    "BuildConfig",
    "CalibConfig",
    "CompletionOutput",
    "KvCacheConfig",
    "LlmArgs",
    "QuantAlgo",
    "QuantConfig",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TorchLlmArgs",
    "TrtLlmArgs",
]
