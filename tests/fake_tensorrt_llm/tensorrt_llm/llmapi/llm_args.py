"""The arguments of LLM: pydantic models that forbid what they do not know. Types that are no matter here are Any."""

from __future__ import annotations

import enum
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator


class StrictBaseModel(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class KvCacheConfig(StrictBaseModel):
    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    sink_token_length: int | None = None
    free_gpu_memory_fraction: float | None = Field(default=0.9, ge=0, le=1)
    host_cache_size: int | None = None
    onboard_blocks: bool = True
    cross_kv_cache_fraction: float | None = None
    secondary_offload_min_priority: int | None = None
    event_buffer_max_size: int = 0
    attention_dp_events_gather_period_ms: int = 5
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    use_uvm: bool = False
    max_gpu_total_bytes: int = 0
    dtype: str = "auto"
    mamba_ssm_cache_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    tokens_per_block: int = 32


class LoadFormat(enum.Enum):
    AUTO = 0
    DUMMY = 1
    VISION_ONLY = 2


class QuantAlgo(str, enum.Enum):
    FP8 = "FP8"
    W4A16_AWQ = "W4A16_AWQ"
    INT8 = "INT8"


class QuantConfig(StrictBaseModel):
    quant_algo: QuantAlgo | None = None
    kv_cache_quant_algo: QuantAlgo | None = None
    group_size: int = 128
    exclude_modules: list[str] | None = None


class CalibConfig(StrictBaseModel):
    device: Literal["cuda", "cpu"] = "cuda"
    calib_dataset: str = "cnn_dailymail"
    calib_batches: int = 512
    calib_batch_size: int = 1
    calib_max_seq_length: int = 512
    random_seed: int = 1234
    tokenizer_max_seq_length: int = 2048


class BuildConfig(StrictBaseModel):
    """Of its fields, those that lem_kit's tests touch."""

    max_input_len: int = 1024
    max_seq_len: int | None = None
    opt_batch_size: int = 8
    max_batch_size: int = 2048
    max_beam_width: int = 1
    max_num_tokens: int = 8192
    strongly_typed: bool = True


class BuildCacheConfig:
    def __init__(self, cache_root: Path | None = None, max_records: int = 10, max_cache_storage_gb: float = 256) -> None:
        self.cache_root = cache_root
        self.max_records = max_records
        self.max_cache_storage_gb = max_cache_storage_gb


class BaseLlmArgs(StrictBaseModel):
    model: str | Path
    tokenizer: Any = None
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    custom_tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    gpus_per_node: int | None = None
    moe_cluster_parallel_size: int | None = None
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    enable_attention_dp: bool = False
    enable_lm_head_tp_in_adp: bool = False
    pp_partition: list[int] | None = None
    cp_config: dict[str, Any] | None = Field(default_factory=dict)
    load_format: Any = "auto"
    fail_fast_on_attention_window_too_large: bool = False
    enable_lora: bool = False
    lora_config: Any = None
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    enable_chunked_prefill: bool = False
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = None
    batched_logits_processor: object | None = None
    iter_stats_max_iterations: int | None = None
    request_stats_max_iterations: int | None = None
    peft_cache_config: Any = None
    scheduler_config: Any = None
    cache_transceiver_config: Any = None
    sparse_attention_config: Any = None
    speculative_config: Any = None
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_beam_width: int | None = None
    max_num_tokens: int | None = 8192
    gather_generation_logits: bool = False
    num_postprocess_workers: int = 0
    postprocess_tokenizer_dir: str | None = None
    reasoning_parser: str | None = None
    decoding_config: object | None = Field(default=None, deprecated="Use speculative_config instead.")
    mpi_session: object | None = Field(default=None, exclude=True, alias="_mpi_session")
    backend: str | None = None
    return_perf_metrics: bool = False
    orchestrator_type: Literal["rpc", "ray"] | None = None


class TorchLlmArgs(BaseLlmArgs):
    garbage_collection_gen0_threshold: int = 20000
    cuda_graph_config: Any = None
    attention_dp_config: Any = None
    disable_overlap_scheduler: bool = False
    moe_config: Any = None
    attn_backend: str = "TRTLLM"
    sampler_type: str = "auto"
    enable_iter_perf_stats: bool = False
    enable_iter_req_stats: bool = False
    print_iter_log: bool = False
    perf_metrics_max_requests: int = 0
    batch_wait_timeout_ms: float = 0
    batch_wait_timeout_iters: int = 0
    batch_wait_max_tokens_ratio: float = 0
    torch_compile_config: Any = None
    enable_autotuner: bool = True
    enable_layerwise_nvtx_marker: bool = False
    load_format: str | LoadFormat = LoadFormat.AUTO
    enable_min_latency: bool = False
    stream_interval: int = Field(default=1, gt=0)
    force_dynamic_quantization: bool = False
    allreduce_strategy: str | None = "AUTO"
    checkpoint_loader: object | None = None
    checkpoint_format: str | None = None
    kv_connector_config: Any = None
    mm_encoder_only: bool = False
    ray_worker_extension_cls: str | None = None
    _quant_config: QuantConfig | None = PrivateAttr(default=None)


class TrtLlmArgs(BaseLlmArgs):
    enable_tqdm: bool = False
    workspace: str | None = None
    enable_build_cache: object = False
    extended_runtime_perf_knob_config: Any = None
    calib_config: CalibConfig | None = None
    quant_config: QuantConfig | None = None
    embedding_parallel_mode: str = "SHARDING_ALONG_VOCAB"
    fast_build: bool = False
    build_config: BuildConfig | None = None
    enable_prompt_adapter: bool = False
    max_prompt_adapter_token: int = 0
    batching_type: Any = None
    normalize_log_probs: bool = False

    @model_validator(mode="after")
    def init_build_config(self) -> TrtLlmArgs:
        if self.build_config is None:
            names = ("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width", "max_input_len")
            given = {name: getattr(self, name) for name in names if getattr(self, name)}
            self.build_config = BuildConfig(**given)
        return self

    @model_validator(mode="after")
    def validate_enable_build_cache(self) -> TrtLlmArgs:
        if isinstance(self.enable_build_cache, bool):
            self.enable_build_cache = BuildCacheConfig() if self.enable_build_cache else False
        elif not isinstance(self.enable_build_cache, BuildCacheConfig):
            raise ValueError(f"Invalid build_cache_config: {self.enable_build_cache}")
        return self

    def engine_name(self, version: str) -> str:
        """What the library's cache calls the engine: neither weights nor GPU are in it."""
        assert self.build_config is not None
        inputs = [json.dumps(self.build_config.model_dump(mode="json"), sort_keys=True), str(self.model)]
        return f"engine-{hashlib.md5(f'{version}-{inputs}'.encode()).hexdigest()}"


LlmArgs = TorchLlmArgs
