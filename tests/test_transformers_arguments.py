"""Every keyword of `load` has its effect, read back from the loaded model and from the record."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import small_llama
import torch
import transformers
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lem_kit.backends import _readback
from lem_kit.backends.transformers import Transformers, _timing, load
from lem_kit.errors import LemError, Unavailable
from lem_kit.measurement import Request

PARAMETERS = 7_016_704


def tokens(backend: Transformers) -> int:
    async def all_of() -> int:
        one = Request(prompt_token_ids=(300, 301), max_new_tokens=3, fixed_length=True)
        return sum([event.n_tokens async for event in backend.generate([one])])

    return asyncio.run(all_of())


def test_dtype_and_attention() -> None:
    backend = load("tiny-llama", attn_implementation="eager", dtype="bfloat16")
    effective = backend.describe()["effective"]
    assert backend._model.config._attn_implementation == effective["attn_implementation"] == "eager"
    assert {p.dtype for p in backend._model.parameters()} == {torch.bfloat16} and effective["dtype"] == "bfloat16"
    assert backend.describe()["model"]["dtype"] == "bfloat16" and backend.describe()["model"]["parameters"] == PARAMETERS
    assert effective["weight_bytes"] == {"cpu": 2 * PARAMETERS} and tokens(backend) == 3
    assert effective["timing"] == "client: stamped in the generating thread"
    backend.close()


def test_a_record_says_whose_clock_stamps_the_tokens() -> None:
    assert _timing(torch.device("cuda:1"), continuous=False).startswith("engine: stamped by the device")
    assert _timing(torch.device("cuda:1"), continuous=True) == "engine: stamped in its loop"
    assert _timing(torch.device("mps"), continuous=False).startswith("client")


def test_device_map(tmp_path: Path) -> None:
    wanted = {"model": "cpu", "lm_head": "disk"}
    backend = load("tiny-llama", device_map=wanted, offload_folder=str(tmp_path))
    effective = backend.describe()["effective"]
    assert backend._model.hf_device_map == effective["device_map"] == wanted
    assert effective["device"] == "cpu" and effective["placement"] == "transformers"
    assert str(backend._model.lm_head.weight.device) == "meta"
    assert effective["weight_bytes"] == {"cpu": 4 * (PARAMETERS - 4096 * 256), "meta": 4 * 4096 * 256}
    model = weakref.ref(backend._model)
    gc.disable()
    try:
        backend.close()
        assert model() is None, "spread over devices, a model holds itself, and so the memory of a GPU"
    finally:
        gc.enable()


def test_max_memory_moves_what_does_not_fit(tmp_path: Path) -> None:
    backend = load("tiny-llama", device_map="auto", max_memory={"cpu": "20MB"}, offload_folder=str(tmp_path))
    effective = backend.describe()["effective"]
    assert backend._model.hf_device_map == effective["device_map"]
    assert effective["device_map"]["model.layers.0"] == "cpu" and effective["device_map"]["lm_head"] == "disk"
    assert sum(effective["weight_bytes"].values()) == 4 * PARAMETERS and effective["weight_bytes"]["cpu"] < 20_000_000
    assert backend.describe()["requested"]["max_memory"] == {"cpu": "20MB"} and tokens(backend) == 3
    backend.close()


def stored(cache: Path, commit: str, reference: str, hidden_size: int) -> None:
    """A snapshot in a cache of the Hub's client, told from others by a size."""
    folder = cache / "models--some--model"
    small_llama.save(folder / "snapshots" / commit, hidden_size)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / reference).write_text(commit)


def test_revision_chooses_the_commit_and_the_commit_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the cache of the Hub's client, without a route to the Hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")
    commits = {"main": "0123456789" * 4, "v2": "abcdefabcd" * 4}
    stored(tmp_path, commits["main"], "main", hidden_size=32)
    stored(tmp_path, commits["v2"], "v2", hidden_size=48)
    for keywords, commit, size in (({}, commits["main"], 32), ({"revision": "v2"}, commits["v2"], 48)):
        backend = load("some/model", cache_dir=str(tmp_path), **keywords)
        facts = backend.describe()
        assert facts["model"]["revision"] == commit and "local_files_only" not in facts["requested"]
        assert facts["model"]["hidden_size"] == size == backend._model.config.hidden_size
        backend.close()


@register_quantization_config("lem_kit_halves")
class HalvesConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """For what needs no package: every linear layer's weights in half precision, kept in a buffer."""

    def __init__(self, skip: str = "lm_head", **_: Any) -> None:
        self.quant_method, self.skip = "lem_kit_halves", skip


class Half(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


@register_quantizer("lem_kit_halves")
class HalvesQuantizer(HfQuantizer):  # type: ignore[misc]
    requires_calibration = False
    is_trainable = False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != self.quantization_config.skip:
                model.set_submodule(name, Half(module.weight.data))
        return model


def test_quantization_config_reaches_the_weights() -> None:
    backend = load("tiny-llama", quantization_config=HalvesConfig())
    facts = backend.describe()
    assert type(backend._model.model.layers[0].mlp.up_proj).__name__ == "Half"
    assert facts["model"]["quantization"]["quant_method"] == "lem_kit_halves"
    assert facts["requested"]["quantization_config"]["skip"] == "lm_head"
    kept = 4 * (2 * 4096 * 256 + 17 * 256)  # embedding, head and norms in 4 bytes; all else in 2
    assert facts["effective"]["weight_bytes"] == {"cpu": kept + 2 * (PARAMETERS - kept // 4)}
    json.dumps(facts, allow_nan=False)
    assert tokens(backend) == 3
    backend.close()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_where_it_is_installed(bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    backend = load("tiny-llama", quantization_config={"quant_method": "bitsandbytes", f"load_in_{bits}bit": True})
    assert backend.describe()["effective"]["weight_bytes"]["cpu"] < 0.5 * 4 * PARAMETERS
    assert backend.describe()["model"]["quantization"]["quant_method"] == "bitsandbytes" and tokens(backend) == 3
    backend.close()


def test_torchao_where_it_is_installed() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    backend = load("tiny-llama", quantization_config=config)
    kept = 4 * (2 * 4096 * 256 + 17 * 256)
    assert backend.describe()["effective"]["weight_bytes"]["cpu"] < kept + 1.1 * (PARAMETERS - kept // 4)
    assert backend.describe()["model"]["quantization"]["quant_method"] == "torchao" and tokens(backend) == 3
    backend.close()


@pytest.mark.parametrize(
    ("keywords", "package"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attn|FlashAttention"),
    ],
)
def test_a_missing_package_is_named(keywords: dict[str, Any], package: str) -> None:
    if importlib.util.find_spec("bitsandbytes" if "quantization_config" in keywords else "flash_attn"):
        pytest.skip("it is installed")
    with pytest.raises(Unavailable, match=f"'tiny-llama' as asked.*({package})"):
        load("tiny-llama", **keywords)


def test_generation_config_of_the_user_is_in_force() -> None:
    """Otherwise greedy, whatever the checkpoint proposes."""
    backend = load("tiny-llama", generation_config=transformers.GenerationConfig(do_sample=True, top_k=3, pad_token_id=0))
    options = backend._options([Request(prompt="a")])
    assert options["do_sample"] is True and backend._model.generation_config.top_k == 3
    assert backend.describe()["effective"]["generation"]["top_k"] == 3
    assert backend.describe()["requested"]["generation_config"]["do_sample"] is True
    backend.close()


def test_a_token_of_the_hub_is_not_kept() -> None:
    assert _readback.requested({"token": "hf_secret", "dtype": "auto"}) == {"token": "(not kept)", "dtype": "auto"}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "default"}, 4096),
    ],
)
def test_a_stretched_context_is_as_long_as_it_says(rope: dict[str, Any] | None, expected: int) -> None:
    class Config:
        max_position_embeddings = 4096
        rope_scaling = rope

    assert _readback._context(Config()) == expected
    assert _readback._context(object()) is None


def test_an_unknown_engine_argument_names_the_nearest() -> None:
    with pytest.raises(LemError, match="'atn_implementation': did you mean 'attn_implementation'"):
        load("tiny-llama", atn_implementation="eager")
    with pytest.raises(LemError, match="did you mean 'continuous_batching'"):
        load("tiny-llama", continous_batching=True)


def test_secrets_of_every_engine_are_known_by_their_names() -> None:
    assert all(_readback.is_secret(name) for name in ("token", "hf_token", "api_key", "password"))
    assert not any(_readback.is_secret(name) for name in ("tokenizer", "max_num_batched_tokens", "skip_tokenizer_init"))
