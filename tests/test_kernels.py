"""`lem kernels`: a real kernel in an environment, and what a container's runtime is told, a script in its place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT

from lem_kit import notebooks
from lem_kit.backends import needs
from lem_kit.cli import main
from lem_kit.errors import LemError
from lem_kit.jupyter import _inside, container, kernels

if sys.version_info >= (3, 11):
    import tomllib


def spec_of(folder: Path) -> Any:
    return json.loads((folder / "kernel.json").read_text())


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH with a `docker` that notes what it is told; its `run` waits for the end of its input."""
    stand_in = tmp_path / "bin" / "docker"
    program(
        stand_in,
        "import json, os, sys\n"
        "log = open(os.path.join(os.path.dirname(__file__), 'log'), 'a')\n"
        "print(json.dumps([sys.argv[1:], dict(os.environ)]), file=log, flush=True)\n"
        "if sys.argv[1] == 'run': sys.stdin.read()\n"
        "if sys.argv[1:3] == ['image', 'inspect']: sys.exit('absent' in sys.argv)\n",
    )
    monkeypatch.setenv("PATH", f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}")
    return stand_in.parent


def told(docker: Path) -> list[tuple[list[str], dict[str, str]]]:
    log = docker / "log"
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def within(seconds: float, condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
    return value


# In an environment


def test_a_kernel_runs_a_notebook_in_the_interpreter_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is an environment's link, in a folder with a space, and lem_kit is loaded before the first cell."""
    home = tmp_path / "an environment"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(sys.executable)
    (home / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    packages = [path for path in sys.path if path.endswith("site-packages")]
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), *packages]), "TRIED": "as set"}
    folder = kernels.install("fake", python=home / "bin" / "python", env=env, prefix=tmp_path / "jupyter")
    assert folder == tmp_path / "jupyter/share/jupyter/kernels/lem-fake"
    assert spec_of(folder)["argv"][0] == str(home / "bin" / "python")
    cells = [
        nbformat.v4.new_code_cell("import os, sys; print(sys.executable, os.environ['TRIED'], os.environ['PATH'])"),
        nbformat.v4.new_code_cell("%%measure_energy\n40 + 2"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "try.ipynb")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter/share/jupyter"))
    notebooks.execute(tmp_path / "try.ipynb", tmp_path / "tried.ipynb", {}, kernel="lem-fake")
    first, second = nbformat.read(tmp_path / "tried.ipynb", as_version=4).cells
    assert first.outputs[0].text.startswith(f"{home}/bin/python as set {home}/bin{os.pathsep}")
    assert second.outputs[-1].data["text/plain"] == "42"


def test_the_default_is_this_interpreter(tmp_path: Path) -> None:
    spec = spec_of(kernels.install("fake", prefix=tmp_path))
    assert spec["argv"] == [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--ext", "lem_kit"]
    assert spec["metadata"]["lem_kit"]["backend"] == "fake" and spec["metadata"]["lem_kit"]["python"] == sys.executable


def test_an_interpreter_that_lacks_something_is_told_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(LemError, match=r"no Python interpreter .*nowhere"):
        kernels.install("fake", python=tmp_path / "nowhere", prefix=tmp_path)
    with pytest.raises(LemError, match=rf"--python {tmp_path}/bin/python"):
        kernels.install("fake", python=tmp_path, prefix=tmp_path)
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    with pytest.raises(LemError, match=r"has no ipykernel and no lem_kit: \S+/bare/bin/python -m pip install ipykernel"):
        kernels.install("fake", python=bare / "bin" / "python", prefix=tmp_path)
    with pytest.raises(LemError, match=r"pip install ipykernel 'lem_kit\[transformers\]'"):
        kernels.install("transformers", python=bare / "bin" / "python", prefix=tmp_path)
    without = program(tmp_path / "without", 'print(\'{"missing": [], "engine": false}\')')
    with pytest.raises(LemError, match=r"no transformers, the engine .* -m pip install 'lem_kit\[transformers\]'"):
        kernels.install("transformers", python=without, prefix=tmp_path)
    broken = program(tmp_path / "broken", "raise ImportError('libzmq.so.5: no such file')")
    with pytest.raises(LemError, match="cannot import what a kernel needs: ImportError: libzmq"):
        kernels.install("fake", python=broken, prefix=tmp_path)
    assert kernels.installed(tmp_path) == []


def test_the_engine_is_looked_for_and_not_imported(tmp_path: Path) -> None:
    (tmp_path / "packages" / "transformers").mkdir(parents=True)
    (tmp_path / "packages" / "transformers" / "__init__.py").write_text("raise SystemExit('imported')")
    kernels.install("transformers", env={"PYTHONPATH": str(tmp_path / "packages")}, prefix=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "fakes"}, "did you mean 'fake'"),
        ({"name": "../escape"}, "lower-case letters"),
        ({"name": "Lem"}, "lower-case letters"),
        ({"name": ".."}, "lower-case letters"),
        ({"gpus": "all"}, "give --container"),
        ({"python": sys.executable, "container": "an-image"}, "not both"),
        ({"container": True}, "no official image"),
        ({"container": "an-image", "runtime": "no-such-runtime"}, "no no-such-runtime on PATH.*--python PATH"),
        ({"env": {"A B": "1"}}, "'A B'"),
    ],
)
def test_mistakes_are_refused(arguments: dict[str, Any], words: str, tmp_path: Path, docker: Path) -> None:
    with pytest.raises(LemError, match=words):
        kernels.install(**{"backend": "fake", "prefix": tmp_path / "jupyter", **arguments})
    assert not (tmp_path / "jupyter").exists()


def test_without_a_runtime_both_ways_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LemError, match=r"no docker or podman on PATH.*lem kernels install fake --python PATH"):
        kernels.install("fake", container="an-image", prefix=tmp_path)


def test_only_kernels_of_lem_kit_are_listed_replaced_and_removed(tmp_path: Path) -> None:
    foreign = tmp_path / "share/jupyter/kernels/python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text('{"argv": ["python"], "metadata": {}}')
    folder = kernels.install("fake", prefix=tmp_path)
    kernels.install("fake", prefix=tmp_path, env={"A": "1"})
    assert spec_of(folder)["env"]["A"] == "1"
    assert [kernel.name for kernel in kernels.installed(tmp_path)] == ["lem-fake"]
    with pytest.raises(LemError, match="not lem_kit's"):
        kernels.install("fake", name="python3", prefix=tmp_path)
    with pytest.raises(LemError, match="jupyter kernelspec remove python3"):
        kernels.remove("python3", prefix=tmp_path)
    with pytest.raises(LemError, match="did you mean 'lem-fake'"):
        kernels.remove("lem-fak", prefix=tmp_path)
    with pytest.raises(LemError, match="lower-case"):
        kernels.remove("../kernels", prefix=tmp_path)
    assert kernels.remove("lem-fake", prefix=tmp_path) == folder and not folder.exists() and foreign.exists()


def test_the_commands(tmp_path: Path, docker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--prefix", str(tmp_path)]
    assert main(["kernels", "install", "fake", "--python", sys.executable, "--env", "A=b=c", *where]) == 0
    assert main(["kernels", "install", "transformers", "--container", "--shm-size", "1g", *where]) == 0
    assert main(["kernels", "install", "fake", "--container", "absent", "--name", "lem-absent", *where]) == 0
    assert "cannot start yet: image not here: docker pull absent" in capsys.readouterr().err
    kept = tmp_path / "share/jupyter/kernels"
    assert spec_of(kept / "lem-fake")["env"]["A"] == "b=c"
    assert spec_of(kept / "lem-transformers")["metadata"]["lem_kit"]["image"] == needs("transformers").image
    gone = spec_of(kept / "lem-fake")
    gone["argv"][0] = str(tmp_path / "gone")
    (kept / "lem-fake" / "kernel.json").write_text(json.dumps(gone))
    assert main(["kernels", "list", *where]) == 0
    shown = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = {row[0].strip(): [cell.strip() for cell in row if cell.strip()] for row in shown}
    assert cells["lem-fake"][2] == "interpreter gone" and cells["lem-absent"][2].startswith("image not here")
    assert cells["lem-transformers"][1:3] == ["transformers", "ok"]
    assert main(["kernels", "remove", "lem-fake", *where]) == 0 and not (kept / "lem-fake").exists()
    assert main(["kernels", "remove", "lem-fake", *where]) == 1


# What the runtime of a container is told (no container here: test_containers.py has real ones)


def started(folder: Path, connection_file: Path, cwd: Path, *more: str, **env: str) -> subprocess.Popen[str]:
    """The kernel as a client starts it: from its own folder, which may hold modules with any name."""
    argv = [part.replace("{connection_file}", str(connection_file)) for part in spec_of(folder)["argv"]]
    environment = {**os.environ, "JPY_PARENT_PID": str(os.getpid()), **spec_of(folder)["env"], **env}
    return subprocess.Popen([*argv, *more], cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_container_is_started_with_all_that_a_kernel_needs(tmp_path: Path, docker: Path) -> None:
    cwd = tmp_path / 'my, "odd": folder'
    cwd.mkdir()
    (cwd / "json.py").write_text("raise SystemExit('a module of the user was taken for the standard library')")
    connection = tmp_path / "runtime dir" / "kernel-1.json"
    connection.parent.mkdir()
    backend = "transformers"
    options = ["--ulimit", "memlock=-1"]
    env = {"SET": "x y", "LET_IN": None, "NOT_THERE": None}
    folder = kernels.install(backend, container="an/image:1", options=options, env=env, prefix=tmp_path, name="tried")
    caches = {"LEM_KIT_CACHE": str(tmp_path / "cache"), "HF_HOME": "~/hub", "HOME": str(tmp_path)}
    secret = {"HF_TOKEN": "hf_secret", "LET_IN": "1", "AWS_SECRET": "not for the kernel", "CUDA_VISIBLE_DEVICES": "1"}
    process = started(folder, connection, cwd, "--IPKernelApp.log_level=40", **caches, **secret)
    argv, environment = within(20, lambda: [entry for entry in told(docker) if entry[0][0] == "run"])[0]
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM, process.stderr and process.stderr.read()

    image = argv.index("an/image:1")
    given, inside = argv[:image], argv[image + 1 :]
    name = next(part.removeprefix("--name=") for part in given if part.startswith("--name="))
    assert {"--rm", "--interactive", "--network=host", "--ipc=host", f"--label=lem_kit.kernel={name}"} <= set(given)
    assert f"--workdir={cwd}" in given and given[-2:] == options
    bound = "--mount=type=bind,source={0},target={0}"
    for shared in (connection.parent, tmp_path / "cache", tmp_path / "hub"):
        assert bound.format(shared) in given
    quoted = str(cwd).replace('"', '""')
    assert f'--mount=type=bind,"source={quoted}","target={quoted}"' in given
    assert f"--mount=type=bind,source={ROOT}/lem_kit,target=/opt/lem_kit/lem_kit,readonly" in given
    passed = {part.removeprefix("--env=") for part in given if part.startswith("--env=")}
    assert {"SET", "LET_IN", "HF_TOKEN", "HF_HOME", "LEM_KIT_CACHE", "CUDA_VISIBLE_DEVICES"} <= passed
    assert not passed & {"AWS_SECRET", "NOT_THERE", "JPY_PARENT_PID", "PATH"}
    assert environment["HF_HOME"] == str(tmp_path / "hub"), "an absolute one: another user is at home inside"
    assert environment["SET"] == "x y" and "hf_secret" not in " ".join(argv), "a secret is not on a command line"
    script, cache, *kernel = inside
    assert script == "/opt/lem_kit/lem_kit/jupyter/_inside.py" and cache == str(tmp_path / "cache")
    assert kernel == ["-f", str(connection), "--ext", "lem_kit", "--IPKernelApp.log_level=40"]
    assert told(docker)[-1][0] == ["rm", "--force", name]


def test_a_container_is_removed_when_its_client_is_gone(tmp_path: Path, docker: Path) -> None:
    folder = kernels.install("fake", container="an-image", prefix=tmp_path)
    argv = [*spec_of(folder)["argv"][:-1], str(tmp_path / "kernel.json")]
    client = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({argv!r})"], cwd=tmp_path)
    within(20, lambda: [entry for entry in told(docker) if entry[0][0] == "run"])
    client.kill()
    client.wait()
    within(10, lambda: [entry for entry in told(docker) if entry[0][0] == "rm"])


def test_a_client_that_was_gone_before_the_kernel_looked_is_gone(tmp_path: Path, docker: Path) -> None:
    folder = kernels.install("fake", container="an-image", prefix=tmp_path)
    with subprocess.Popen(["true"]) as past:
        pass
    process = started(folder, tmp_path / "kernel.json", tmp_path, JPY_PARENT_PID=str(past.pid))
    assert process.wait(20) == 128 + signal.SIGTERM and told(docker)[-1][0][0] == "rm"


def test_a_runtime_that_fails_says_what_to_type(tmp_path: Path, docker: Path) -> None:
    program(docker / "docker", "import sys; sys.exit(125 if sys.argv[1] == 'run' else 0)")
    folder = kernels.install("fake", container="an-image", prefix=tmp_path)
    process = started(folder, tmp_path / "kernel.json", tmp_path)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 125 and "docker pull an-image" in said
    (docker / "docker").unlink()
    process = started(folder, tmp_path / "kernel.json", tmp_path, PATH=str(docker))
    _, said = process.communicate(timeout=20)
    assert process.returncode == 127 and "no docker on PATH" in said


def machine(root: Path, *gpus: tuple[str, bool]) -> Path:
    """A machine with GPUs, by UUID and whether this process may use each; a device that cannot be opened is not there."""
    for number, (uuid, usable) in enumerate(gpus):
        facts = root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0/information"
        facts.parent.mkdir(parents=True)
        facts.write_text(f"Model: \t\t A board\nGPU UUID: \t {uuid}\nDevice Minor: \t {number}\n")
        (root / "dev").mkdir(exist_ok=True)
        if usable:
            (root / f"dev/nvidia{number}").touch()
    return root


def test_gpus_are_handed_over_as_each_runtime_wants_it(tmp_path: Path, docker: Path) -> None:
    podman = str(program(tmp_path / "bin" / "podman", "print('podman version 5.0')"))
    two = machine(tmp_path / "two", ("GPU-a", True), ("GPU-b", True))
    assert container.gpu_options("docker", "all", tmp_path) == []
    assert container.gpu_options("docker", "all", two) == ["--gpus=all"]
    assert container.gpu_options(podman, "all", two) == ["--device=nvidia.com/gpu=all"]
    assert container.gpu_options("docker", "none", two) == []
    assert container.gpu_options("docker", "0,GPU-b", tmp_path) == ['--gpus="device=0,GPU-b"']
    assert container.gpu_options(podman, "0,1", two) == ["--device=nvidia.com/gpu=0", "--device=nvidia.com/gpu=1"]


def test_docker_is_told_which_gpus_a_scheduler_left_to_this_process(tmp_path: Path, docker: Path) -> None:
    shared = machine(tmp_path / "shared", ("GPU-a", False), ("GPU-b", True), ("GPU-c", True))
    assert container.gpu_options("docker", "all", shared) == ['--gpus="device=GPU-b,GPU-c"']
    none = machine(tmp_path / "none", ("GPU-a", False))
    assert container.gpu_options("docker", "all", none) == []


# What the container's first process does before the kernel


def test_what_the_image_must_have_is_what_lem_kit_depends_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(_inside.NEEDED.values()) == {"ipykernel", *project["dependencies"]}
    assert {*_inside.NEEDED_WITH_GPU.values()} <= {*project["optional-dependencies"]["nvml"]}


def test_meters_of_boards_are_needed_where_there_are_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_inside.importlib.util, "find_spec", lambda name: None)
    assert _inside.missing(tmp_path) == [*_inside.NEEDED.values()]
    assert _inside.missing(machine(tmp_path, ("GPU-a", True))) == [
        *_inside.NEEDED.values(),
        *_inside.NEEDED_WITH_GPU.values(),
    ]


def wheel(folder: Path, name: str) -> None:
    """An installable package of one line, so that no index is asked."""
    import zipfile

    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "here = True\n")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_what_an_image_lacks_is_installed_once_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel(tmp_path, "lem_kit_try")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = _inside.provide(["lem_kit_try"], tmp_path / "cache")
    assert folder is not None and (folder / "lem_kit_try.py").exists()
    assert "lacks lem_kit_try: pip installs them into" in capfd.readouterr().err
    (tmp_path / "lem_kit_try-1.0-py3-none-any.whl").unlink()
    assert _inside.provide(["lem_kit_try"], tmp_path / "cache") == folder
    assert capfd.readouterr().err == ""


def test_what_cannot_be_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert _inside.provide(["lem_kit_nowhere>=2"], tmp_path) is None
    assert "build an image that has them" in capfd.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "container-packages").iterdir())
