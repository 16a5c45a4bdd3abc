"""What the files of a checkpoint say of a model whose weights are in another process, or are not loaded yet.

The one idea: config.json and the headers of the weights hold the model's identity and shape. A folder with a compiled engine
has a config.json, too, whose "pretrained_config" is that of its checkpoint. Not covered: what an engine does with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from ..measurement import jsonable
from . import _hub, _readback

_WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")


def config(path: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or of a Hub model; {} where it is not on this machine."""
    file = _config_file(path, revision)
    return {} if file is None else dict(json.loads(file.read_text(encoding="utf-8")))


def facts(name: str, path: str, revision: str | None = None, dtype: str = "auto") -> dict[str, Any]:
    """Identity and shape, None where the files do not tell. `dtype` is that of the checkpoint unless one is given; what
    quantised weights stand for is not counted."""
    file, whole = _config_file(path, revision), config(path, revision)
    inner: Mapping[str, Any] = whole.get("pretrained_config") or whole
    quantization = inner.get("quantization_config") or inner.get("quantization")
    return {
        "name": name,
        "revision": _hub.commit(path, {"revision": revision}),
        "architecture": next(iter(inner.get("architectures") or [inner.get("architecture")])),
        "parameters": None if quantization or file is None else _elements(file.parent),
        "dtype": inner.get("dtype") or inner.get("torch_dtype") if dtype == "auto" else dtype,
        "quantization": jsonable(quantization),
        **_readback.shape(types.SimpleNamespace(**(inner.get("text_config") or inner))),
    }


def downloaded(path: str, revision: str | None = None) -> Path:
    """The folder of a model, fetched from the Hub if it is no folder."""
    if not os.path.isdir(path):
        path = huggingface_hub.snapshot_download(path, revision=revision, ignore_patterns=["original/*"])
    return Path(path)


def digest(folder: Path) -> str:
    """SHA-256 that another checkpoint does not have: the content of every file of weights or JSON in the folder.

    Where an index lists the files of weights, size and time of each stand for its content, which spares reading a large
    model; a checkpoint that is written anew then gets another digest even if it is the same.
    """
    found = hashlib.sha256()
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in (".json", *_WEIGHTS)]
    indexed = any(file.name.endswith(".index.json") for file in files)
    for file in files:
        state = file.stat()
        found.update(f"{file.relative_to(folder)} {state.st_size} ".encode())
        if indexed and file.suffix in _WEIGHTS:
            found.update(str(state.st_mtime_ns).encode())
            continue
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def _config_file(path: str, revision: str | None) -> Path | None:
    file: Any = os.path.join(path, "config.json")
    if not os.path.isdir(path):
        file = huggingface_hub.try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(file) if isinstance(file, str) and os.path.isfile(file) else None


def _elements(folder: Path) -> int | None:
    """Numbers in the safetensors files of a folder, None without any. Some hold a second copy in another layout, or an
    adapter: only the files that the index names count, or else those that are named as a model's are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in names]
        if not all(file.is_file() for file in files):
            return None
    else:
        files = [f for f in folder.glob("*.safetensors") if not f.name.startswith(("consolidated", "adapter"))]
    shapes: list[Any] = []
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes += [tensor["shape"] for key, tensor in header.items() if key != "__metadata__"]
    return sum(map(math.prod, shapes)) or None
