"""Measured cells in a real kernel: its event loop, its interrupts, its completion, its end. No meter is needed."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import IPython
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel


class Notebook:
    """A kernel with lem_kit loaded, and what its cells answered."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager, self.client = manager, client
        self.outputs: list[dict[str, Any]] = []
        self.seconds = 0.0

    def run(self, cell: str, interrupt_after_s: float | None = None) -> tuple[str, str]:
        """The status of the reply, and everything that was shown as text."""
        self.outputs = []
        if interrupt_after_s is not None:
            threading.Timer(interrupt_after_s, self.manager.interrupt_kernel).start()
        began = time.monotonic()
        reply = self.client.execute_interactive(
            cell, output_hook=self.outputs.append, timeout=60, allow_stdin=False, stop_on_error=False
        )
        self.seconds = time.monotonic() - began
        return reply["content"]["status"], "".join(map(_text, self.outputs))

    def value(self, expression: str) -> Any:
        status, shown = self.run(f"print(repr(({expression})))")
        assert status == "ok", shown
        return eval(shown)

    def completions(self, line: str) -> list[str]:
        self.client.complete(line)
        while (message := self.client.get_shell_msg(timeout=30))["msg_type"] != "complete_reply":
            pass
        return list(message["content"]["matches"])


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    if message["msg_type"] == "error":
        return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"]))
    return str(content.get("text", "") or content.get("data", {}).get("text/plain", ""))


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    folder = tmp_path_factory.mktemp("notebook")
    settings = {**os.environ, "LEM_KIT_SOURCES": "none", "IPYTHONDIR": str(folder)}
    manager, client = start_new_kernel(env=settings, cwd=str(folder))
    book = Notebook(manager, client)
    status, shown = book.run("import sys, time, asyncio\nbefore = set(sys.modules)\n%load_ext lem_kit")
    assert (status, shown) == ("ok", "")
    book.run("from lem_kit.jupyter import session\nloaded = set(sys.modules) - before")
    yield book
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_loading_imports_nothing_heavy(notebook: Notebook) -> None:
    heavy = "{'numpy', 'pandas', 'pyarrow', 'torch', 'transformers', 'plotly', 'ipywidgets', 'papermill', 'nbconvert'}"
    assert notebook.value(f"loaded & {heavy}") == set()


def test_a_cell_that_awaits_runs_in_the_kernels_own_loop(notebook: Notebook) -> None:
    status, shown = notebook.run(
        "%%measure_energy -o m --repeat 2\nloop = asyncio.get_running_loop()\nawait asyncio.sleep(0.01)\n"
        "!echo from a shell\n41 + 1"
    )
    assert status == "ok" and shown.count("from a shell") == 2 and shown.endswith("42")
    (card,) = [o["content"] for o in notebook.outputs if o["msg_type"] == "display_data"]
    assert card["metadata"]["lem_kit"]["status"] == "ok" and {"text/plain", "text/html"} == card["data"].keys()
    assert notebook.value("m.status, len(m.repeats), _") == ("ok", 2, 42)
    assert notebook.run("import asyncio\nawait asyncio.sleep(0)\nasyncio.get_running_loop() is loop")[1] == "True"


def test_other_tasks_go_on_while_the_counter_is_waited_for(notebook: Notebook) -> None:
    ticks = "async def tick():\n    while True:\n        seen.append(time.monotonic())\n        await asyncio.sleep(0.01)\n"
    wait = "from lem_kit.sampler import Sampler\nsettle = Sampler.settle\nSampler.settle = lambda self, t: time.sleep(0.3)\n"
    notebook.run(f"{ticks}{wait}seen = []\nticking = asyncio.create_task(tick())")
    notebook.run("%%measure_energy --quiet\nawait asyncio.sleep(0)")
    longest_s = notebook.value("max(b - a for a, b in zip(seen, seen[1:]))")
    notebook.run("ticking.cancel(); Sampler.settle = settle")
    assert longest_s < 0.25


@pytest.mark.parametrize(
    "body",
    ["time.sleep(20)", "await asyncio.sleep(20)", "x = [float(i) for i in range(1000)]\nwhile True:\n    sum(x)"],
    ids=["sync", "async", "busy"],
)
def test_an_interrupt_is_prompt_and_its_record_kept(notebook: Notebook, body: str) -> None:
    status, shown = notebook.run(f"%%measure_energy -o m\n{body}\nafter = 1", interrupt_after_s=0.5)
    assert status == "error" and notebook.seconds < 5
    assert [o["content"]["ename"] for o in notebook.outputs if o["msg_type"] == "error"] == [
        "CancelledError" if "await" in body else "KeyboardInterrupt"
    ]
    assert "cell (window, interrupted)" in shown and body.splitlines()[-1].strip() in shown
    name, duration_s, nothing = notebook.value("m.status, m.duration_s, 'after' in globals()")
    assert name == "interrupted" and 0.3 < duration_s < 5 and nothing is False
    assert notebook.value("session().open_windows") == []
    notebook.run("%%measure_energy -o m --quiet\n1")
    assert notebook.value("m.status, m.parent") == ("ok", None)


def test_an_interrupt_of_code_that_holds_the_loop_up_belongs_to_the_cell(notebook: Notebook) -> None:
    """The kernel does not raise it before that code has ended."""
    status, _ = notebook.run("%%measure_energy -o m --quiet\nawait asyncio.sleep(0)\ntime.sleep(1)", interrupt_after_s=0.3)
    assert status == "error" and notebook.value("m.status") == "interrupted"


def test_a_measured_cell_that_is_not_marked_is_interrupted_as_promptly(notebook: Notebook) -> None:
    notebook.run("%lem_auto on")
    status, shown = notebook.run("await asyncio.sleep(20)", interrupt_after_s=0.5)
    notebook.run("%lem_auto off")
    assert status == "error" and notebook.seconds < 5 and "await asyncio.sleep(20) [interrupted]" in shown


def test_a_cell_that_awaits_inside_another_magic_says_what_to_do(notebook: Notebook) -> None:
    _, shown = notebook.run("%%capture\n%%measure_energy\nawait asyncio.sleep(0)")
    assert "MeasureUsageError" in shown and "not inside %%capture" in shown
    status, shown = notebook.run("%%capture kept\n%%measure_energy --label inner\n6 * 7")
    assert (status, shown) == ("ok", "")
    assert "inner (window, ok)" in notebook.run("kept.show()")[1]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("%%measure_energy --in", ["--interval"]),
        ("%measure_energy --ba", ["--baseline"]),
        ("%lem_auto o", ["on", "off"]),
        ("%lem_st", ["%lem_status"]),
    ],
)
def test_tab_gives_exactly_our_options(notebook: Notebook, line: str, found: list[str]) -> None:
    given = set(notebook.completions(line))
    assert given == set(found) or (IPython.version_info < (8, 6) and given > set(found))  # where Jedi guesses besides


def test_help_is_the_parsers(notebook: Notebook) -> None:
    reply = notebook.client.execute("%measure_energy?", reply=True, timeout=30)
    (page,) = reply["content"]["payload"]
    text = re.sub(r"\x1b\[[0-9;]*m", "", page["data"]["text/plain"])
    assert "--interval SHARE" in text and "0.02 for 2 %" in text and "%measure_energy [-o NAME]" in text


def test_a_restart_in_mid_cell_leaves_nothing_running(tmp_path: Path) -> None:
    settings = {**os.environ, "LEM_KIT_SOURCES": "none", "IPYTHONDIR": str(tmp_path)}
    manager, client = start_new_kernel(env=settings)
    book = Notebook(manager, client)
    try:
        book.run("%load_ext lem_kit")
        client.execute(f"%%measure_energy --save {tmp_path}/runs\nimport os\nprint(os.getpid())\nwhile True: pass")
        while (message := client.get_iopub_msg(timeout=30))["msg_type"] != "stream":
            pass
        pid = int(message["content"]["text"])
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=60)
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
        assert not (tmp_path / "runs").exists(), "what did not end is no record"
        status, shown = book.run("%load_ext lem_kit\n%measure_energy 6 * 7")
        assert status == "ok" and shown.endswith("42")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
