"""A stand-in for the library TensorRT-LLM, which needs an NVIDIA GPU: where it lies, and how to have it imported.

What it mirrors, and from where that was read, is in `tensorrt_llm/__init__.py`. Nothing here shows how the library behaves.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
H100 = ("NVIDIA H100 80GB HBM3", (9, 0))


@contextlib.contextmanager
def importable(*gpus: tuple[str, tuple[int, int]], compiled: bool = True) -> Iterator[Any]:
    """Meanwhile the stand-in is what is imported, new and without a trace after, and torch sees these GPUs (one H100 unless
    given). `compiled`: it has the flavour of compiled engines, as releases 1.0 to 1.2 have. Yields the stand-in."""
    backend = importlib.import_module("lem_kit.backends.tensorrt_llm")
    _forget()
    sys.path.insert(0, str(HERE))
    try:
        library = importlib.import_module("tensorrt_llm")
        if compiled:
            library.__path__.append(str(HERE / "compiled"))
        with mock.patch.object(backend, "_gpus", lambda: list(gpus) or [H100]):
            yield library
    finally:
        sys.path.remove(str(HERE))
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
