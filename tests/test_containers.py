"""Kernels in real containers: `make test-container`. Whatever is killed, no container is left.

Podman stands in for Docker's daemon, which few test machines run. No image is fetched: an empty root becomes one, and the
system and this environment are mounted into it, by the options that users have for such things.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT

import lem_kit
from lem_kit.jupyter import kernels

pytestmark = pytest.mark.container

IMAGE = "localhost/lem-kit-test:latest"
GONE_WITHIN_S = 10.0


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Podman with settings, storage and an image of its own, and the folder of what else the tests write."""
    if not shutil.which("podman") or not shutil.which("runc"):
        pytest.fail("podman or runc is missing: apt-get install podman runc")
    folder = tmp_path_factory.mktemp("containers")
    (folder / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=1024:4096", "nproc=10000:10000"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    )
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/state"\n'
    )
    settings = {
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "JUPYTER_PATH": str(folder / "jupyter/share/jupyter"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "LEM_KIT_CACHE": str(folder / "cache of lem_kit"),
        "HF_HOME": str(folder / "hub"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        program = f"{sys.prefix}/bin:/usr/bin:/bin"
        subprocess.run(
            ["podman", "import", "--change", f"ENV PATH={program}", "-", IMAGE],
            input=empty_root(),
            check=True,
            capture_output=True,
        )
        yield folder
        subprocess.run(["podman", "rmi", "--force", IMAGE], capture_output=True)


def empty_root() -> bytes:
    """A root file system without a file, as a tar archive."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name in ("usr", "etc", "proc", "sys", "dev", "run", "tmp", "opt"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name in ("bin", "sbin", "lib", "lib64"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
            archive.addfile(entry)
    return written.getvalue()


def mounted(*folders: str) -> list[str]:
    return [f"--mount=type=bind,source={folder},target={folder},readonly" for folder in dict.fromkeys(folders)]


@pytest.fixture(scope="session")
def kernel(machine: Path) -> str:
    return installed(machine, "podman")


@pytest.fixture(scope="session", params=["podman", "docker"])
def either_kernel(request: pytest.FixtureRequest, machine: Path) -> Iterator[str]:
    """A kernel of each runtime: Docker's own command is served by Podman, which speaks its protocol, too."""
    if request.param == "podman":
        yield request.getfixturevalue("kernel")
        return
    if not shutil.which("docker") or "podman" in subprocess.check_output(["docker", "--version"], text=True):
        pytest.skip("Docker's command is not installed")
    address = f"unix://{machine}/docker.sock"
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(["podman", "system", "service", "--time=0", address], stderr=subprocess.DEVNULL) as service,
    ):
        patch.setenv("DOCKER_HOST", address)
        within = time.monotonic() + 10
        while not (machine / "docker.sock").exists():
            assert service.poll() is None and time.monotonic() < within
            time.sleep(0.05)
        yield installed(machine, "docker")
        service.terminate()


def installed(machine: Path, runtime: str) -> str:
    options = mounted("/usr", *(folder for folder in (sys.prefix, sys.base_prefix) if folder != "/usr"))
    options += ["--ulimit=nofile=1024:4096", "--ulimit=nproc=10000:10000"]
    folder = kernels.install(
        "fake", container=IMAGE, runtime=runtime, name=f"lem-in-{runtime}", options=options, env={"TRIED": "a b"},
        prefix=machine / "jupyter",
    )  # fmt: skip
    assert [found.state for found in kernels.installed(machine / "jupyter") if found.folder == folder] == ["ok"]
    return folder.name


@pytest.fixture(autouse=True)
def no_container_is_left(machine: Path) -> Iterator[None]:
    assert not containers()
    yield
    gone_after_s()


def containers() -> list[str]:
    """The containers of lem_kit's kernels, running or not."""
    command = ["podman", "ps", "--all", "--quiet", "--filter", "label=lem_kit.kernel"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def gone_after_s() -> float:
    started = time.monotonic()
    while containers():
        assert time.monotonic() - started < GONE_WITHIN_S, "a container outlives its kernel"
        time.sleep(0.05)
    return time.monotonic() - started


def processes(words: str) -> list[int]:
    """Processes of this machine, those in containers included, whose command line has these words."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in line and int(file.parent.name) != os.getpid():
            found.append(int(file.parent.name))
    return found


def notebook(path: Path, *cells: str) -> Path:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


def papermill(kernel: str, path: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "papermill", "-k", kernel, "--no-progress-bar", path.name, "done.ipynb"]
    return subprocess.Popen(command, cwd=path.parent, stderr=subprocess.PIPE, text=True, **options)


class Client:
    """A kernel with somebody who talks to it."""

    def __init__(self, name: str) -> None:
        from jupyter_client.manager import start_new_kernel

        self.manager, self.client = start_new_kernel(kernel_name=name, startup_timeout=30)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    @property
    def supervisor(self) -> int:
        return int(self.manager.provisioner.pid)

    def run(self, code: str) -> str:
        """What a cell prints, or the name of its exception."""
        heard: list[str] = []

        def listen(message: Any) -> None:
            if message["msg_type"] == "stream":
                heard.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, timeout=30, output_hook=listen, store_history=False)
        return "".join(heard) if reply["content"]["status"] == "ok" else str(reply["content"]["ename"])


def test_a_notebook_runs_in_a_container_as_it_would_outside(kernel: str, tmp_path: Path) -> None:
    """In a folder whose name is as odd as names get; lem_kit is loaded, measures and saves to the notebook's folder."""
    folder = tmp_path / 'it\'s "my", folder: $HOME'
    folder.mkdir()
    path = notebook(
        folder / "try.ipynb",
        "import os; print(os.getcwd(), os.environ['TRIED'], os.environ['LEM_KIT_CACHE'], sep='\\n')",
        "%%measure_energy --save runs\n40 + 2",
        "import lem_kit as lem\n"
        "backend = lem.load_backend('fake', 'any')\n"
        "with lem.Session('runs', sources=[]) as session:\n"
        "    m = session.run(backend, lem.prompts.synthetic(2, input_tokens=4, output_tokens=4))\n"
        "print(m.environment['container'], lem.__file__)",
    )
    process = papermill(kernel, path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    first, second, third = nbformat.read(folder / "done.ipynb", as_version=4).cells
    assert first.outputs[0].text.splitlines() == [str(folder), "a b", os.environ["LEM_KIT_CACHE"]]
    assert second.outputs[-1].data["text/plain"] == "42"
    assert third.outputs[0].text.split() == ["podman", "/opt/lem_kit/lem_kit/__init__.py"]
    assert len(lem_kit.frame(folder / "runs")) == 2
    assert "--existing" not in said


def test_an_interrupt_reaches_the_cell_and_the_kernel_goes_on(either_kernel: str) -> None:
    with Client(either_kernel) as client:
        assert client.run("print(6 * 7)") == "42\n"
        # With stop_on_error a kernel aborts what comes while it still empties its queue.
        client.client.execute("import time; time.sleep(60)", stop_on_error=False)
        time.sleep(0.5)
        client.manager.interrupt_kernel()
        reply = client.client.get_shell_msg(timeout=10)
        assert reply["content"].get("ename") == "KeyboardInterrupt"
        os.kill(client.supervisor, signal.SIGINT)  # from a client that knows signals only: ends nothing
        assert client.run("print('still here')") == "still here\n"


def test_a_kernel_that_is_shut_down_or_restarted_leaves_nothing(kernel: str) -> None:
    with Client(kernel) as client:
        for now in (False, True):
            assert client.run("x = 1") == ""
            client.manager.restart_kernel(now=now)
            client.client.wait_for_ready(timeout=30)
            assert client.run("x") == "NameError"
        client.manager.shutdown_wait_time = 20.0  # after half of it the client asks the operating system
        began = time.monotonic()
        client.manager.shutdown_kernel()
        assert time.monotonic() - began < 9.0, "it had to be told twice"
        gone_after_s()


@pytest.mark.parametrize("killed", ["supervisor", "command", "supervisor and command"])
def test_the_container_goes_with_whoever_is_killed(either_kernel: str, killed: str) -> None:
    """The kernel's own children, too: an engine's workers hold a GPU."""
    with Client(either_kernel) as client:
        client.run("import subprocess; subprocess.Popen(['sleep', '98765'], start_new_session=True)")
        assert processes("sleep 98765")
        victims = [client.supervisor] if "supervisor" in killed else []
        if "command" in killed:
            victims += processes(f"{either_kernel.removeprefix('lem-in-')} run --rm --interactive")
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        gone_after_s()
        assert not processes("sleep 98765")


@pytest.mark.parametrize("killed", ["client", "client and supervisor", "client's process group"])
def test_the_container_goes_with_its_client(kernel: str, killed: str, tmp_path: Path) -> None:
    path = notebook(tmp_path / "long.ipynb", "open('running', 'w').close(); import time; time.sleep(600)")
    client = papermill(kernel, path, start_new_session=True)
    began = time.monotonic()
    while not (tmp_path / "running").exists():
        assert client.poll() is None and time.monotonic() - began < 60
        time.sleep(0.05)
    assert len(containers()) == 1
    if killed == "client's process group":
        os.killpg(client.pid, signal.SIGKILL)
    else:
        supervisors = processes(f"{ROOT}/lem_kit/jupyter/container.py")
        for victim in [client.pid, *(supervisors if "supervisor" in killed else [])]:
            os.kill(victim, signal.SIGKILL)
    client.wait()
    gone_after_s()
    within = time.monotonic() + GONE_WITHIN_S
    while processes(f"{ROOT}/lem_kit/jupyter/container.py"):
        assert time.monotonic() < within, "the supervisor outlives its client"
        time.sleep(0.05)
    assert client.stderr is not None
    client.stderr.close()


def test_an_image_that_is_not_there_fails_at_once(machine: Path, tmp_path: Path) -> None:
    name = kernels.install(
        "fake", container="lem-kit-nowhere", runtime="podman", name="lem-nowhere", prefix=machine / "jupyter"
    ).name
    (found,) = (kernel for kernel in kernels.installed(machine / "jupyter") if kernel.name == name)
    assert found.state == "image not here: podman pull lem-kit-nowhere"
    began = time.monotonic()
    process = papermill(name, notebook(tmp_path / "try.ipynb", "1"))
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 20
    assert "lem-kit-nowhere: image not known" in said and "podman pull lem-kit-nowhere" in said


def test_an_image_that_lacks_the_kernel_says_so_at_once(machine: Path, tmp_path: Path) -> None:
    """The system's Python, with no ipykernel, no pip that could fetch it, or no index."""
    bare = "/usr/bin/python3"
    if not os.access(bare, os.X_OK) or sys.base_prefix == "/usr":
        pytest.skip(f"{bare} is not there, or this environment's own")
    options = [*mounted("/usr"), f"--entrypoint={bare}", "--env=PIP_NO_INDEX=1"]
    name = kernels.install(
        "fake", container=IMAGE, runtime="podman", name="lem-bare", options=options, prefix=machine / "jupyter"
    ).name
    process = papermill(name, notebook(tmp_path / "try.ipynb", "1"))
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "this image lacks ipykernel" in said and "build an image that has them" in said
