"""An IPython shell with the magics loaded, and a counter that the test turns. The fixtures are in `conftest`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

import lem_kit as lem
from lem_kit.energy import Reading
from lem_kit.trace import Domain


class Meter:
    """A counter that is exact at every read: 100 W since the clock's start."""

    name = "meter"

    def __init__(self, clock: Callable[[], int]) -> None:
        self.domains: Mapping[str, Domain] = {"gpu0": Domain("gpu", "counter", refresh_s=0.0)}
        self._clock = clock

    def read(self) -> dict[str, Reading]:
        return {"gpu0": Reading(self._clock(), 100 * self._clock() / 1e9)}

    def close(self) -> None:
        pass


@contextlib.contextmanager
def loaded() -> Iterator[InteractiveShell]:
    """A new shell with the extension; its session is closed at the end."""
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))  # no database of its own
    lem.load_ipython_extension(shell)
    try:
        yield shell
    finally:
        lem.unload_ipython_extension(shell)
        InteractiveShell.clear_instance()


def run(shell: InteractiveShell, cell: str) -> tuple[Any, str]:
    """What a cell returned, and the text that it showed."""
    with capture_output() as captured:
        result = shell.run_cell(cell, store_history=True)
    shown = captured.stdout + "".join(output.data["text/plain"] for output in captured.outputs)
    return result, re.sub(r"\x1b\[[0-9;]*m", "", shown)
