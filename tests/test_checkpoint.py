"""What the files of a checkpoint say of a model's size, each weight once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
from lem_kit.backends import _checkpoint


def weights(file: Path, *shape: int) -> None:
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 0]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def test_a_copy_in_another_layout_and_an_adapter_are_not_counted(tmp_path: Path) -> None:
    assert _checkpoint._elements(tmp_path) is None
    weights(tmp_path / "model.safetensors", 10, 10)
    weights(tmp_path / "consolidated.safetensors", 10, 10)
    weights(tmp_path / "adapter_model.safetensors", 5, 5)
    assert _checkpoint._elements(tmp_path) == 100


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    weights(tmp_path / "a.safetensors", 3)
    weights(tmp_path / "b.safetensors", 4)
    weights(tmp_path / "c.safetensors", 50)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert _checkpoint._elements(tmp_path) == 7
    (tmp_path / "b.safetensors").unlink()
    assert _checkpoint._elements(tmp_path) is None, "a part is missing, so the whole is not known"
