"""Simulated hardware, one entry per energy source: name -> a context in which that source opens on any machine.

The context is given an empty folder and yields the argument for `open_source` (None for none). A new source adds its entry
here, so that the contract test can hold it to its promises without the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


@contextmanager
def _nvml(folder: Path) -> Iterator[str | None]:
    from fake_nvml import boards, h100

    with pytest.MonkeyPatch.context() as patch, boards([h100(), h100()]):
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        yield None


@contextmanager
def _rapl(folder: Path) -> Iterator[str | None]:
    from .powercap import zone

    zone(folder, "intel-rapl:0", "package-0", 5_000_000)
    zone(folder, "intel-rapl:0:0", "dram", 1_000_000)
    yield str(folder)


@contextmanager
def _codecarbon(folder: Path) -> Iterator[str | None]:
    pytest.importorskip("codecarbon")
    yield None


@contextmanager
def _replay(folder: Path) -> Iterator[str | None]:
    file = folder / "recording.csv"
    file.write_text("t_s,gpu0,cpu\n0,100,5\n0.01,102,5.5\n0.02,104,6\n")
    yield str(file)


MACHINES: dict[str, Callable[[Path], AbstractContextManager[str | None]]] = {
    "codecarbon": _codecarbon,
    "nvml": _nvml,
    "rapl": _rapl,
    "replay": _replay,
}
