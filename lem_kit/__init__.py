"""lem_kit: energy, latency and throughput of LLM inference, measured from a notebook. Names load on first use."""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "LemError": "errors",
    "Measurement": "measurement",
    "Request": "measurement",
    "Session": "session",
    "load_backend": "backends",
    "load": "store",
    "frame": "store",
    "search": "study.search",
    "compare": "comparison",
    "plot_compare": "plots",
    "repeat_until": "statistics",
}
_MODULES = ("flops", "goodput", "lengths", "metrics", "models", "phases", "prompts", "report", "steady", "traces", "traffic")
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "Session" and "ipykernel" in sys.modules:  # with or without %load_ext, long windows in a notebook have a view
        importlib.import_module(".jupyter.live", __name__).enable()
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'lem_kit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext lem_kit`: registers `%%measure_energy`, `%lem_auto` and `%lem_status`."""
    from .jupyter import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext lem_kit`: removes the magics and closes the notebook's session."""
    from .jupyter import unload

    unload(shell)
