"""LLM of both flavours."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from ..behaviour import BEHAVIOUR
from ..bindings import steady_clock_now
from ..executor import Executor, RequestOutput
from ..sampling_params import SamplingParams
from ..version import __version__
from .llm_args import BuildCacheConfig, BuildConfig, TorchLlmArgs, TrtLlmArgs


class TokenizerBase:
    eos_token_id = 2

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


class DefaultInputProcessor:
    def __init__(self, tokenizer: TokenizerBase | None) -> None:
        self.tokenizer = tokenizer

    def __call__(self, inputs: dict[str, Any], sampling_params: SamplingParams) -> tuple[list[int], None]:
        if self.tokenizer is None:
            raise ValueError("tokenizer is required to tokenize string prompt")
        return self.tokenizer.encode(inputs["prompt"], add_special_tokens=sampling_params.add_special_tokens), None


class BaseLLM:
    _arguments: Any = TorchLlmArgs

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: Literal["auto", "slow"] = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        for key in kwargs:
            if key not in {*self._arguments.model_fields, "_mpi_session", "backend"}:
                raise ValueError(f"{type(self).__name__} got invalid argument: {key}")
        self.args = self._arguments(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            **kwargs,
        )
        self._executor: Executor | None = None
        self._build_model()

    def _build_model(self) -> None:
        folder = Path(self.args.tokenizer or self.args.model)
        known = None if self.args.skip_tokenizer_init else TokenizerBase(folder)
        self.input_processor = DefaultInputProcessor(known)
        if BEHAVIOUR.load_failure is not None:
            raise RuntimeError("Executor worker returned error") from BEHAVIOUR.load_failure
        self._executor = Executor(self.args)

    @property
    def tokenizer(self) -> TokenizerBase | None:
        return self.input_processor.tokenizer

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        if self._executor is None or self._executor.is_shutdown():
            raise RuntimeError("LLM is shutting down")
        arrival: timedelta | None = steady_clock_now() if self.args.return_perf_metrics else None
        sampling_params = sampling_params or SamplingParams()
        if sampling_params.end_id is None:
            if self.tokenizer is None and not sampling_params.ignore_eos:
                raise ValueError("tokenizer is required to reset end_id if it is None")
            if self.tokenizer is not None:
                sampling_params._setup(self.tokenizer)
        sampling_params.return_perf_metrics = sampling_params.return_perf_metrics or self.args.return_perf_metrics
        if isinstance(inputs, str):
            inputs, _ = self.input_processor({"prompt": inputs}, sampling_params)
        if not isinstance(inputs, list) or not all(isinstance(token, int) for token in inputs):
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        limit = self.args.max_num_tokens
        if limit and not self.args.enable_chunked_prefill and len(inputs) > limit:
            raise ValueError(f"The sum of prompt length ({len(inputs)}) should not exceed max_num_tokens ({limit})")
        assert streaming, "lem_kit asks for each token"
        return self._executor.generate_async(inputs, sampling_params, arrival)

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        assert self._executor is not None
        return self._executor.get_stats(timeout=timeout or 0.0)

    def shutdown(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None


class _TrtLLM(BaseLLM):
    _arguments = TrtLlmArgs

    def _build_model(self) -> None:
        folder = Path(self.args.model)
        config = json.loads((folder / "config.json").read_text())
        if "build_config" in config:
            self.args.build_config = BuildConfig(**config["build_config"])
        else:
            self.args.tokenizer = self.args.tokenizer or folder
            self.args.model = self._engine(folder, config)
        super()._build_model()

    def _engine(self, folder: Path, config: dict[str, Any]) -> Path:
        """Where the engine lies: in the cache, compiled if it is not there yet, or nowhere that lasts."""
        cache = self.args.enable_build_cache
        if isinstance(cache, BuildCacheConfig):
            assert cache.cache_root is not None
            engine = cache.cache_root / self.args.engine_name(__version__) / "content"
            if engine.is_dir():
                return engine
            engine.mkdir(parents=True)
            self.save(str(engine), config)
        BEHAVIOUR.builds += 1
        return folder

    def save(self, engine_dir: str, config: dict[str, Any]) -> None:
        told = {"pretrained_config": config, "build_config": self.args.build_config.model_dump(), "version": __version__}
        Path(engine_dir, "config.json").write_text(json.dumps(told))


class _TorchLLM(BaseLLM):
    def __init__(self, model: str | Path, *args: Any, **kwargs: Any) -> None:
        backend = kwargs.pop("backend", "pytorch")
        if foreign := kwargs.keys() & TrtLlmArgs.model_fields.keys() - TorchLlmArgs.model_fields.keys():
            raise ValueError(f"The following arguments are specific to TensorRT backend: {sorted(foreign)}")
        super().__init__(model, *args, backend=backend, **kwargs)


class LLM(_TorchLLM):
    pass
