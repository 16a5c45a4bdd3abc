"""A STAND-IN for TensorRT-LLM 1.2, made for tests without a GPU. It computes nothing: token k of a request is 1000 + k.

Its signatures were read from public source text of github.com/NVIDIA/TensorRT-LLM, and it takes nothing else, as pydantic
and dataclasses there do not:

    llmapi/llm.py              LLM, generate_async, get_stats, shutdown, _prepare_sampling_params, _check_arguments:
                               commit 4c05a74891e4df8066f08ed4ce14b0972abe4e25
    llmapi/llm_args.py         BaseLlmArgs and TrtLlmArgs: class bodies of release 1.2.1 as a third party's tool printed them
                               (github.com/henrycgbaker/llenergymeasure); TorchLlmArgs and KvCacheConfig: a text of the
                               months before release 1.2 whose commit is not known
    sampling_params.py         SamplingParams: likewise a text before 1.2
    executor/result.py         CompletionOutput, GenerationResult (one object, changed by each response): likewise
    executor/executor.py,      what an error does: a text is the request's (RequestError), an exception ends the executor;
      proxy.py, base_worker.py a worker that ends leaves its error in _error_queue, and who waits is not woken: likewise
    pyexecutor/py_executor.py  when a response is made under stream_interval; iteration statistics: likewise
    llmapi/build_cache.py      BuildCacheConfig, key and place of an engine: commit 0fccc5b97dd7b23c438e740b3bf4dcde607266c4
    _tensorrt_engine           commit 1620d4fd1b30d9b655b479c0de692486e6af01f4; that 1.2.1 still has it was read in a program
                               for that release (github.com/invarlock)
    bindings                   steady_clock_now, request_perf_metrics as datetime.timedelta: from their uses in the above

No release was installed or run. That a test passes here says that lem_kit keeps to these signatures, and nothing of what the
real library does.
"""

from . import llmapi
from .llmapi import LLM, KvCacheConfig, LlmArgs, SamplingParams, TorchLlmArgs, TrtLlmArgs
from .version import __version__

__all__ = ["LLM", "KvCacheConfig", "LlmArgs", "SamplingParams", "TorchLlmArgs", "TrtLlmArgs", "__version__", "llmapi"]
