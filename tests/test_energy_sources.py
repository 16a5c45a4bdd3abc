"""Opening the sources: each once, reasons for those that do not open, and nothing left open after an error."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from lem_kit import energy
from lem_kit.energy import Reading, describe, open_sources
from lem_kit.errors import LemError, Unavailable
from lem_kit.trace import Domain


class Meter:
    def __init__(self, name: str) -> None:
        self.name = name
        self.domains: Mapping[str, Domain] = {"gpu0": Domain("gpu", "counter", label="a board")}
        self.closed = False

    def read(self) -> dict[str, Reading]:
        return {}

    def close(self) -> None:
        self.closed = True


class Files:
    """Stands for the files of the folder: "good" and "fine" open, "absent" is unavailable, "broken" raises."""

    def __init__(self) -> None:
        self.opened: list[Meter] = []
        self.arguments: list[str | None] = []

    def __call__(self, module: str) -> SimpleNamespace:
        name = module.rpartition(".")[2]

        def open_source(argument: str | None = None) -> Meter:
            self.arguments.append(argument)
            if name == "absent":
                raise Unavailable("no such hardware")
            if name == "broken":
                raise OSError("undefined symbol")
            self.opened.append(Meter(name))
            return self.opened[-1]

        return SimpleNamespace(open_source=open_source)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    found = Files()
    monkeypatch.setattr(energy.importlib, "import_module", found)
    monkeypatch.setattr(energy, "source_names", lambda: ["absent", "broken", "fine", "good"])
    monkeypatch.delenv("LEM_KIT_SOURCES", raising=False)
    return found


def test_every_source_that_opens_is_opened_and_the_others_say_why(files: Files) -> None:
    opened, unavailable = open_sources()
    assert [source.name for source in opened] == ["fine", "good"]
    assert unavailable == {"absent": "no such hardware", "broken": "OSError: undefined symbol"}


def test_what_is_asked_for_twice_is_opened_once(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, unavailable = open_sources(["good=x", " good=x ", "absent=y", "none", ""])
    assert [source.name for source in opened] == ["good"] and unavailable == {"absent": "no such hardware"}
    assert files.arguments == ["x", "y"]
    monkeypatch.setenv("LEM_KIT_SOURCES", "fine, good,fine,")
    assert [source.name for source in open_sources()[0]] == ["fine", "good"]
    monkeypatch.setenv("LEM_KIT_SOURCES", "none")
    assert open_sources() == ([], {})
    assert open_sources([]) == ([], {})


@pytest.mark.parametrize(
    ("specs", "error", "words"),
    [(["good", "goood"], LemError, "did you mean 'good'"), (["fine", "good", "broken"], OSError, "undefined symbol")],
)
def test_after_an_error_nothing_is_left_open(files: Files, specs: list[str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_sources(specs)
    assert files.opened and all(meter.closed for meter in files.opened)


def test_a_source_is_described_by_its_domains_and_its_own_facts() -> None:
    meter = Meter("m")
    assert describe(meter)["domains"]["gpu0"]["label"] == "a board"
    meter.describe = lambda: {"driver": "1"}  # type: ignore[attr-defined]
    assert describe(meter)["driver"] == "1"


def test_a_source_that_cannot_describe_itself_is_still_described() -> None:
    def gone() -> dict[str, str]:
        raise OSError("GPU is lost")

    meter = Meter("m")
    meter.describe = gone  # type: ignore[attr-defined]
    assert describe(meter)["error"] == "OSError: GPU is lost" and "gpu0" in describe(meter)["domains"]
