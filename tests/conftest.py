"""What every test shares: a clock to turn by hand, and the check that nothing is left running."""

from __future__ import annotations

import asyncio
import selectors
import signal
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lem_kit.sampler import Sampler

if TYPE_CHECKING:
    from fake_nvml import Machine
    from IPython.core.interactiveshell import InteractiveShell

ROOT = Path(__file__).parent.parent


class FakeClock:
    """Nanoseconds that pass when told to."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000_000

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


class Impatient(selectors.DefaultSelector):
    """An event loop on it never waits: where it would, the clock is turned instead."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "the loop would wait for ever"
        self._clock.advance(max(timeout, 0))
        return super().select(0)


def run_at_once(work: Coroutine[Any, Any, Any], clock: FakeClock) -> Any:
    """Run a coroutine whose sleeps pass on `clock` alone: seconds of a schedule take no time and are exact."""
    loop = asyncio.SelectorEventLoop(Impatient(clock))
    loop.time = lambda: clock() / 1e9  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT is a KeyboardInterrupt, also where a shell has started the tests in the background, with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def nvml(clock: FakeClock) -> Iterator[Machine]:
    """Two H100s at a constant 200 W and a square wave; NVML is initialised; the time is 1000 s."""
    pynvml = pytest.importorskip("pynvml")
    from fake_nvml import Square, boards, h100

    with boards([h100(), h100(wave=Square(70, 300, 0.83))], clock) as machine:
        pynvml.nvmlInit()
        yield machine
        pynvml.nvmlShutdown()
    assert machine.sessions == 0


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> FakeClock:
    """A notebook's session reads a counter of 100 W at every edge of a window; `clock` in the notebook turns it."""
    from ipython_shell import Meter

    import lem_kit as lem
    from lem_kit import jupyter

    monkeypatch.setattr(Sampler, "start", lambda self: self.sample())
    monkeypatch.setattr(Sampler, "edge", lambda self: (self.sample(), self._clock())[1])
    monkeypatch.setattr(jupyter, "Session", lambda: lem.Session(sources=[Meter(clock)], clock=clock))
    return clock


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest, nothing_left_running: None
) -> Iterator[InteractiveShell]:
    """An IPython shell with the magics loaded and no meter, unless the test has `metered`, too."""
    from ipython_shell import loaded

    monkeypatch.setenv("LEM_KIT_SOURCES", "none")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    clock = request.getfixturevalue("metered") if "metered" in request.fixturenames else None
    with loaded() as shell:
        shell.user_ns["clock"] = clock
        yield shell


@pytest.fixture(autouse=True)
def nothing_left_running(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test may leave a sampler's thread alive or a sampler's sources open."""
    samplers: list[Sampler] = []
    begin = Sampler.__init__

    def noted(self: Sampler, *args: object, **kwargs: object) -> None:
        begin(self, *args, **kwargs)  # type: ignore[arg-type]
        samplers.append(self)

    monkeypatch.setattr(Sampler, "__init__", noted)
    yield
    threads = [thread.name for thread in threading.enumerate() if thread.name == "lem-sampler"]
    left = [source.name for sampler in samplers for source in sampler.sources]
    assert not threads and not left, f"left running: {threads}, left open: {left}"
