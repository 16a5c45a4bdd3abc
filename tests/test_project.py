"""The project's own promises: what an import costs, what environments install, what the documents say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import ROOT

from lem_kit.measurement import REASONS

if sys.version_info >= (3, 11):
    import tomllib

HEAVY = ("torch", "transformers", "IPython", "pandas", "plotly", "numpy", "pyarrow", "asyncio")


def test_importing_lem_kit_imports_nothing_heavy() -> None:
    code = f"import sys, lem_kit; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import lem_kit

    assert all(getattr(lem_kit, name) is not None for name in lem_kit.__all__)
    assert set(lem_kit.__all__) <= set(dir(lem_kit))


def test_the_conda_environment_installs_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = set(project["dependencies"]).union(*(extras[n] for n in ("transformers", "nvml", "codecarbon", "notebook")))
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    assert set(pip) - {"-e ."} == wanted and "-e ." in pip and len(pip) == len(set(pip))


def test_every_requirement_has_an_exact_version() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {r for group in extras["optional-dependencies"].values() for r in group} | set(extras["dependencies"])
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in constraints() if "==" in line}
    assert {re.split(r"[<>=!~\[; ]", r)[0].lower().replace("_", "-") for r in named} <= pinned


def constraints() -> list[str]:
    return (ROOT / "constraints.txt").read_text().splitlines()


def test_plug_in_extras_are_named_like_their_files() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = {path.stem for folder in ("backends", "energy") for path in (ROOT / "lem_kit" / folder).glob("*.py")}
    assert set(extras) - {"datasets", "browser", "gemma", "notebook", "search", "test"} <= files


def test_the_method_page_lists_every_reason_code() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", (ROOT / "docs/method.md").read_text(), re.M))
    assert rows == dict(REASONS)


def test_links_between_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_file_speaks_of_a_machine_or_an_index() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [n for n in listed.stdout.split("\0") if n] or [str(p) for p in ROOT.rglob("*.py")]
    wrong = re.compile(r"(?<![\w.:/])/(?:root|home|Users)/\w|--(?:extra-)?index-" + "url")
    for name in names:
        path = Path(ROOT / name)
        if path.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".ipynb", ".txt", ".cfg", ".json", ""} and path.is_file():
            assert not wrong.search(path.read_text(errors="replace")), name
