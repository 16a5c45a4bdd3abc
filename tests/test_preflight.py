"""Preflight: each check's exact sentence and remedy, on simulated boards, fake /sys trees and a disk of any size."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import Machine, Mig, Process, a100, boards, error, h100, lost, v100
from machines.powercap import zone

from lem_kit import backends, energy, preflight
from lem_kit.backends import Needs, load_backend
from lem_kit.check import Check
from lem_kit.cli import main
from lem_kit.energy import rapl
from lem_kit.errors import LemError

pynvml = pytest.importorskip("pynvml")

GIB = 2**30
VISIBLE = "CUDA_VISIBLE_DEVICES"
HEAVY = ("torch", "transformers", "vllm", "tensorrt_llm", "pandas", "numpy", "pyarrow", "codecarbon", "IPython", "asyncio")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the user's, no torch, and no container."""
    for name in (VISIBLE, "CUDA_DEVICE_ORDER", "LEM_KIT_SOURCES", "KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    torch_says(monkeypatch, None)


def torch_says(monkeypatch: pytest.MonkeyPatch, version: Path | None) -> None:
    """The file version.py of the torch that is installed, if any."""
    find_spec = importlib_find_spec()
    spec = None if version is None else SimpleNamespace(origin=str(version.with_name("__init__.py")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: spec if name == "torch" else find_spec(name, *a))


def importlib_find_spec() -> Callable[..., Any]:
    import importlib.util

    return importlib.util.find_spec


@pytest.fixture
def machine() -> Iterator[Machine]:
    """An H100 and a V100."""
    with boards([h100(uuid="GPU-aaaa", latencies=()), v100(uuid="GPU-bbbb", latencies=())]) as machine:
        yield machine
    assert machine.sessions == 0, "NVML was left initialised"


def of_gpus(root: Path, least: tuple[int, int] | None = None) -> dict[str, Check]:
    """What the boards' source says, by name; the first of each."""
    found: dict[str, Check] = {}
    for check in energy.checks(root, least):
        if check.name != "RAPL":
            found.setdefault(check.name, check)
    return found


def test_a_check_has_a_remedy_exactly_where_it_is_not_ok() -> None:
    for state, remedy in (("ok", "type this"), ("warning", None), ("failure", None)):
        with pytest.raises(ValueError, match="remedy"):
            Check("x", state, "What.", remedy)  # type: ignore[arg-type]


def test_boards_that_are_well(machine: Machine, tmp_path: Path) -> None:
    assert of_gpus(tmp_path, (7, 0)) == {
        "GPU": Check("GPU", "ok", "Driver 580.95.05: GPU 0 (NVIDIA H100 80GB HBM3), GPU 1 (Tesla V100-SXM2-32GB)."),
        VISIBLE: Check(VISIBLE, "ok", "Not set: every GPU is visible."),
        "architecture": Check("architecture", "ok", "Compute capability 7.0 is needed: GPU 0 has 9.0, GPU 1 has 7.0."),
        "other processes": Check("other processes", "ok", "None is seen on GPU 0, GPU 1."),
        "MIG": Check("MIG", "ok", "Off."),
        "persistence mode": Check("persistence mode", "ok", "On."),
    }
    assert "architecture" not in of_gpus(tmp_path), "nothing is asked for"


EVERY = "unset CUDA_VISIBLE_DEVICES, or export CUDA_VISIBLE_DEVICES=0,1"


@pytest.mark.parametrize(
    ("visible", "state", "finding", "seen"),
    [
        ("1", "ok", "'1' shows GPU 1.", "GPU 1"),
        ("1, 0", "ok", "'1, 0' shows GPU 1, GPU 0.", "GPU 1, GPU 0"),
        ("GPU-a", "ok", "'GPU-a' shows GPU 0.", "GPU 0"),
        ("0,-1,1", "ok", "'0,-1,1' shows GPU 0.", "GPU 0"),
        ("", "warning", "'' hides every GPU.", None),
        ("-1", "warning", "'-1' hides every GPU.", None),
        ("2", "failure", "'2': '2' names no GPU that answers, and so CUDA sees no GPU.", None),
        ("0,7,1", "failure", "'0,7,1': '7' names no GPU that answers, and so CUDA sees no more than GPU 0.", "GPU 0"),
        ("all", "failure", "'all': 'all' names no GPU that answers, and so CUDA sees no GPU.", None),
        ("GPU-", "failure", "'GPU-': 'GPU-' fits 2 GPUs, and so CUDA sees no GPU.", None),
        (
            "0x",
            "warning",
            "'0x': CUDA takes '0x' for the number it begins with.",
            "GPU 0",
        ),
        ("7x", "failure", "'7x': '7x' names no GPU that answers, and so CUDA sees no GPU.", None),
        (
            "0,GPU-bbbb",
            "failure",
            "'0,GPU-bbbb': 'GPU-bbbb' stands among entries of another kind, and so CUDA sees no more than GPU 0.",
            "GPU 0",
        ),
        ("0,0", "failure", "'0,0': GPU 0 stands there twice, and so CUDA sees no GPU.", None),
        ("GPU-aaaa,GPU-aa", "failure", "'GPU-aaaa,GPU-aa': GPU 0 stands there twice, and so CUDA sees no GPU.", None),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    visible: str,
    state: Any,
    finding: str,
    seen: str | None,
) -> None:
    monkeypatch.setenv(VISIBLE, visible)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    found = of_gpus(tmp_path)
    assert found[VISIBLE] == Check(VISIBLE, state, finding, None if state == "ok" else EVERY)
    others = found.get("other processes")
    assert (others.finding if others else None) == (f"None is seen on {seen}." if seen else None)


def test_numbers_of_unlike_boards_need_an_order(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    sentence = "'0': GPU numbers were taken in PCI bus order, but CUDA numbers the fastest first."
    assert of_gpus(tmp_path)[VISIBLE] == Check(VISIBLE, "warning", sentence, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")


def test_an_old_architecture_is_a_failure_where_no_board_is_newer(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sentence = "Compute capability 8.0 is needed, but GPU 1 (Tesla V100-SXM2-32GB) has 7.0."
    mixed = Check("architecture", "warning", sentence, "export CUDA_VISIBLE_DEVICES=GPU-aaaa")
    assert of_gpus(tmp_path, (8, 0))["architecture"] == mixed
    monkeypatch.setenv(VISIBLE, "GPU-bbbb")
    remedy = "use a GPU of compute capability 8.0 or newer, or another backend (`lem doctor` lists them)"
    assert of_gpus(tmp_path, (8, 0))["architecture"] == Check("architecture", "failure", sentence, remedy)
    for board in machine.boards:
        board.fail(error(3, "nvmlDeviceGetCudaComputeCapability"))
    assert "architecture" not in of_gpus(tmp_path, (8, 0)), "what a board does not tell is not held against it"


def test_other_processes_are_named_with_their_memory(machine: Machine, tmp_path: Path) -> None:
    machine.boards[1].processes = [Process(os.getpid(), GIB), Process(999_998, 3 * GIB // 2), Process(999_999, 2**64 - 1)]
    machine.apply()
    assert of_gpus(tmp_path)["other processes"] == Check(
        "other processes",
        "warning",
        "At work are 999998 on GPU 1 with 1.5 GiB; 999999 on GPU 1 with memory of unknown size.",
        "export CUDA_VISIBLE_DEVICES=GPU-aaaa, or end what `ps -fp 999998,999999` shows",
    )
    machine.boards[0].processes = machine.boards[1].processes = [Process(999_998, GIB)]
    machine.apply()
    assert of_gpus(tmp_path)["other processes"] == Check(
        "other processes",
        "warning",
        "At work are 999998 on GPU 0 with 1.0 GiB; 999998 on GPU 1 with 1.0 GiB.",
        "end what `ps -fp 999998` shows",
    )


def test_a_process_that_cannot_be_seen_may_be_this_one_once_it_uses_cuda(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.boards[0].processes = [Process(999_998, GIB)]
    machine.apply()
    assert of_gpus(tmp_path)["other processes"].state == "warning"
    properties = SimpleNamespace(uuid="aaaa")
    cuda = SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 1, get_device_properties=lambda n: properties)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert of_gpus(tmp_path)["other processes"].state == "ok"


def test_mig_and_persistence_mode(machine: Machine, tmp_path: Path) -> None:
    machine.boards[0].mig_mode, machine.boards[0].migs = 1, (Mig("MIG-1"), Mig("MIG-2"))
    machine.boards[0].persistence = machine.boards[1].persistence = 0
    machine.apply()
    found = of_gpus(tmp_path)
    assert found["MIG"] == Check(
        "MIG",
        "warning",
        "GPU 0: split by MIG, so that energy is known for the whole board only.",
        "sudo nvidia-smi -mig 0 -i 0",
    )
    assert found["persistence mode"] == Check(
        "persistence mode",
        "warning",
        "Off on GPU 0, GPU 1: the driver unloads when nobody uses it, and its energy counter may start again.",
        "sudo nvidia-smi -pm 1 -i 0,1",
    )
    for board in machine.boards:
        board.fail(error(3, "nvmlDeviceGetMigMode", "nvmlDeviceGetPersistenceMode"))
    assert not {"MIG", "persistence mode"} & of_gpus(tmp_path).keys()


def test_two_instances_of_one_board_are_not_the_same_twice(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.boards[0].mig_mode, machine.boards[0].migs = 1, (Mig("MIG-1"), Mig("MIG-2"))
    machine.apply()
    monkeypatch.setenv(VISIBLE, "MIG-1,MIG-2")
    assert of_gpus(tmp_path)[VISIBLE] == Check(VISIBLE, "ok", "'MIG-1,MIG-2' shows GPU 0.")
    monkeypatch.setenv(VISIBLE, "MIG-1,MIG-1")
    assert of_gpus(tmp_path)[VISIBLE].finding == "'MIG-1,MIG-1': GPU 0 stands there twice, and so CUDA sees no GPU."


def test_a_board_that_is_lost_does_not_hide_its_neighbour(machine: Machine, tmp_path: Path) -> None:
    machine.boards[0].fail(lost())
    present, silent, *_ = (check for check in energy.checks(tmp_path) if check.name == "GPU")
    assert present == Check("GPU", "ok", "Driver 580.95.05: GPU 1 (Tesla V100-SXM2-32GB).")
    sentence = "GPU 0 does not answer: GPU is lost."
    assert silent == Check("GPU", "warning", sentence, "sudo nvidia-smi --gpu-reset -i 0, or sudo reboot")
    assert of_gpus(tmp_path)["other processes"].finding == "None is seen on GPU 1."


def test_a_driver_without_boards(machine: Machine, tmp_path: Path) -> None:
    machine.boards.clear()
    machine.apply()
    look = "look at what `nvidia-smi -L` says"
    assert of_gpus(tmp_path) == {"GPU": Check("GPU", "warning", "Driver 580.95.05 is here, but no GPU.", look)}


GIVE = "start the container with --gpus all (Kubernetes: nvidia.com/gpu: 1 under resources: limits:)"


@pytest.mark.parametrize(
    ("code", "finding", "remedy", "in_a_container"),
    [
        (
            pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
            "The NVIDIA driver does not answer: its library is of another version than the kernel module that is loaded.",
            "sudo reboot, or sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && sudo modprobe nvidia",
            "start the container anew, or reboot its host",
        ),
        (
            pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
            "The NVIDIA driver does not answer (Driver Not Loaded).",
            "sudo modprobe nvidia",
            GIVE,
        ),
        (
            pynvml.NVML_ERROR_NO_PERMISSION,
            "This process may not open the NVIDIA driver (Insufficient Permissions).",
            "`ls -l /dev/nvidia*` shows the group that may: sudo usermod -aG GROUP $USER",
            GIVE,
        ),
        (
            pynvml.NVML_ERROR_UNKNOWN,
            "The NVIDIA driver does not answer (Unknown Error).",
            "look at what `nvidia-smi` says",
            "look at what `nvidia-smi` says",
        ),
    ],
    ids=["mismatch", "not loaded", "permission", "unknown"],
)
def test_a_driver_that_does_not_open(
    machine: Machine, tmp_path: Path, code: int, finding: str, remedy: str, in_a_container: str
) -> None:
    machine.init_error = code
    machine.apply()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert of_gpus(tmp_path) == {"GPU": Check("GPU", "failure", finding, remedy)}
    (tmp_path / ".dockerenv").touch()
    assert of_gpus(tmp_path) == {"GPU": Check("GPU", "failure", finding, in_a_container)}


def test_no_driver_is_a_warning_unless_there_is_a_device(machine: Machine, tmp_path: Path) -> None:
    machine.init_error = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    machine.apply()
    sentence = "No NVIDIA driver here (libnvidia-ml.so.1 is not found)."
    remedy = "if `lspci | grep -i nvidia` shows a GPU, install its driver"
    assert of_gpus(tmp_path)["GPU"] == Check("GPU", "warning", sentence, remedy)
    vendor = tmp_path / "sys/bus/pci/devices/0000:01:00.0/vendor"
    vendor.parent.mkdir(parents=True)
    for number, state in (("0x8086", "warning"), ("0x10de", "failure")):
        vendor.write_text(f"{number}\n")
        assert of_gpus(tmp_path)["GPU"] == Check("GPU", state, sentence, remedy)  # type: ignore[arg-type]
    (tmp_path / ".dockerenv").touch()
    assert of_gpus(tmp_path)["GPU"] == Check("GPU", "warning", sentence, GIVE), "the host's boards are not the container's"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert of_gpus(tmp_path)["GPU"] == Check("GPU", "failure", sentence, GIVE)


def test_without_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sentence = "The package nvidia-ml-py is not installed."
    assert of_gpus(tmp_path) == {"GPU": Check("GPU", "warning", sentence, "pip install 'lem_kit[nvml]'")}


@pytest.mark.parametrize(
    ("line", "state", "finding", "remedy"),
    [
        ("cuda: Optional[str] = '13.0'", "ok", "torch is built for CUDA 13.0, the driver serves CUDA 12.4.", None),
        ("cuda = '12.8'", "ok", "torch is built for CUDA 12.8, the driver serves CUDA 12.4.", None),
        ("cuda = None", "warning", "torch is built without CUDA: an engine that uses it here runs on the CPU.", "pip"),
        ("hip = '6.1'", None, "", None),
    ],
)
def test_torch_must_fit_the_driver(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    line: str,
    state: str | None,
    finding: str,
    remedy: str | None,
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
    torch_says(monkeypatch, tmp_path / "version.py")
    machine.cuda = 12040
    machine.apply()
    found = of_gpus(tmp_path).get("torch")
    if "13.0" in line:
        sentence = "torch is built for CUDA 13.0, but the driver serves CUDA 12.4."
        remedy = "update the driver, or pip install a torch that is built for CUDA 12"
        assert found == Check("torch", "failure", sentence, remedy)
    elif state is None:
        assert found is None
    else:
        assert found is not None and (found.state, found.finding) == (state, finding)
        assert (found.remedy or "").startswith(remedy or "")


# --- the rest of the machine ------------------------------------------------------------------------------------------


def powercap(root: Path) -> Path:
    return root / "sys/class/powercap"


def test_rapl_that_can_be_read(tmp_path: Path) -> None:
    zone(powercap(tmp_path), "intel-rapl:0", "package-0", 5_000_000)
    zone(powercap(tmp_path), "intel-rapl:0:0", "dram", 3_000_000)
    assert rapl.preflight(None, tmp_path, None) == [Check("RAPL", "ok", "The counters of package-0, dram-0 can be read.")]


def test_rapl_that_only_root_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(powercap(tmp_path), "intel-rapl:0", "package-0", 5_000_000)

    def denied(path: object, flags: int) -> int:  # root, who may run the tests, is never refused
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(rapl.os, "open", denied)
    assert rapl.preflight(None, tmp_path, None) == [
        Check("RAPL", "warning", "Only root may read the counters.", f"sudo chmod -R a+r {powercap(tmp_path)}")
    ]


def test_rapl_that_is_not_there_or_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = rapl.preflight(None, tmp_path, None)
    assert (check.state, check.finding) == ("warning", f"No counters under {powercap(tmp_path)}.")
    assert "sudo modprobe intel_rapl_msr" in str(check.remedy) and "LEM_KIT_SOURCES=rapl=/powercap" in str(check.remedy)
    zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 5_000_000)
    monkeypatch.setenv("LEM_KIT_SOURCES", f"codecarbon, rapl={tmp_path / 'powercap'}")
    assert Check("RAPL", "ok", "The counters of package-0 can be read.") in energy.checks(tmp_path)


def test_a_broken_source_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr(rapl, "preflight", broken)
    sentence, remedy = "It cannot be asked: RuntimeError: oh.", "pip install --force-reinstall 'lem_kit[rapl]'"
    found = energy.checks(tmp_path)
    assert Check("rapl", "warning", sentence, remedy) in found and found[0].name == "GPU"


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free) if Path(path).exists() else nowhere())


def nowhere() -> None:
    raise FileNotFoundError(2, "No such file or directory")


TWO = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "seed": 3}
SPREAD = Needs(package="engine", parallel=("tensor_parallel_size", "pipeline_parallel_size"))


def test_shared_memory_matters_where_processes_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    told = "/dev/shm, where 2 processes are to meet, has"
    disk(monkeypatch, GIB)
    assert preflight.shared_memory(SPREAD, TWO, tmp_path) == [Check("shared memory", "ok", f"{told} 1.0 GiB free.")]
    disk(monkeypatch, 64 * 2**20)
    remedy = "sudo mount -o remount,size=8G /dev/shm"
    sentence = f"{told} 0.1 GiB free, less than 1.0 GiB."
    assert preflight.shared_memory(SPREAD, TWO, tmp_path) == [Check("shared memory", "failure", sentence, remedy)]
    (tmp_path / ".dockerenv").touch()
    (check,) = preflight.shared_memory(SPREAD, {**TWO, "pipeline_parallel_size": 3}, tmp_path)
    assert "where 6 processes" in check.finding and check.remedy == "start the container with --ipc=host or --shm-size=8g"
    for one in ({}, {"tensor_parallel_size": 1}, {"tensor_parallel_size": None}, {"seed": 2}):
        assert preflight.shared_memory(SPREAD, one, tmp_path) == []
    assert preflight.shared_memory(Needs(package="engine"), TWO, tmp_path) == []
    (tmp_path / "dev/shm").rmdir()
    (check,) = preflight.shared_memory(SPREAD, TWO, tmp_path)
    assert check.finding == "/dev/shm, where 2 processes are to meet, cannot be used: No such file or directory."


def test_results_need_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    disk(monkeypatch, GIB)
    there = Check("results", "ok", f"{tmp_path} has 1.0 GiB free.")
    assert preflight.results(Path()) == preflight.results(tmp_path / "not/yet/there") == there
    assert list(tmp_path.iterdir()) == [], "nothing is made"
    disk(monkeypatch, GIB - 2**20)
    elsewhere = "choose another folder: lem.Session(FOLDER), or lem study run --out FOLDER"
    sentence = f"{tmp_path} has 1.0 GiB free."
    assert preflight.results(tmp_path) == Check("results", "warning", sentence, f"make room there, or {elsewhere}")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert preflight.results(tmp_path) == Check("results", "failure", f"{tmp_path} cannot be written to.", elsewhere)


def test_models_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("LEM_KIT_CACHE", str(tmp_path / "lem"))
    disk(monkeypatch, 10 * GIB)
    one = [Check("model cache", "ok", f"{tmp_path} has 10.0 GiB free.")]
    assert preflight.model_caches() == one, "one disk, one line"
    disk(monkeypatch, 9 * GIB)
    remedy = "make room there, or export HF_HOME=/a/folder/on/a/larger/disk"
    assert preflight.model_caches() == [Check("model cache", "warning", f"{tmp_path} has 9.0 GiB free.", remedy)]

    def refused(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", refused)
    (check,) = preflight.model_caches()
    assert (
        check.finding == f"{tmp_path / 'hf/hub'} cannot be looked at."
        and check.remedy == "export HF_HOME=/a/folder/of/yours"
    )


def test_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.clocks().state == "ok"
    monkeypatch.setattr(time, "get_clock_info", lambda name: SimpleNamespace(implementation=f"{name}()"))
    assert preflight.clocks() == Check(
        "clocks",
        "warning",
        "time.monotonic (monotonic()) and time.perf_counter (perf_counter()) are two clocks, so an engine's stamps may be "
        "off.",
        "run on Linux, where both are CLOCK_MONOTONIC",
    )


# --- engines ----------------------------------------------------------------------------------------------------------


def needing(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """The backend "fake" as if it needed this."""
    monkeypatch.setattr(preflight, "needs", lambda name: Needs(**facts))


def test_an_engine_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert preflight.engine("fake") == Check("engine", "ok", "fake is a part of lem_kit.")
    needing(monkeypatch, package="pytest.mark")
    assert preflight.engine("fake") == Check("engine", "ok", f"pytest.mark {pytest.__version__} is installed.")
    needing(monkeypatch, package="yaml")  # of a distribution of another name
    assert re.fullmatch(r"yaml [\d.]+ is installed\.", preflight.engine("fake").finding)
    needing(monkeypatch, package="no_such_engine", image="an/image:1")
    remedy = "pip install 'lem_kit[fake]', or use the image an/image:1"
    assert preflight.engine("fake") == Check("engine", "failure", "no_such_engine is not installed.", remedy)
    (tmp_path / "no_such_engine").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert preflight.engine("fake").state == "failure", "a folder of that name is no package"
    monkeypatch.setitem(sys.modules, "no_such_engine", SimpleNamespace())  # type: ignore[arg-type]
    assert preflight.engine("fake") == Check("engine", "ok", "no_such_engine is loaded.")


def test_an_unknown_backend_names_the_nearest() -> None:
    for ask in (lambda: preflight.run("fak"), lambda: preflight.engine("fak"), lambda: main(["doctor", "--backend", "fak"])):
        try:
            assert ask() == 1  # the command line says it on stderr
        except LemError as problem:
            assert "did you mean 'fake'" in str(problem)


def test_what_makes_loading_pointless_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    needing(monkeypatch, package="engine", compute_capability=(8, 0), parallel=("tensor_parallel_size",))
    load = lambda **args: load_backend("fake", "fake", **args)  # noqa: E731
    load().close()
    monkeypatch.setenv(VISIBLE, "5")
    words = (
        r"^Backend 'fake' was not loaded\. CUDA_VISIBLE_DEVICES: '5': .* sees no GPU\. Remedy: unset CUDA_VISIBLE_DEVICES"
    )
    with pytest.raises(LemError, match=words):
        load()
    monkeypatch.setenv(VISIBLE, "1")
    with pytest.raises(LemError, match=r"architecture: Compute capability 8\.0 is needed, .* Remedy: use a GPU"):
        load()
    monkeypatch.setenv(VISIBLE, "")
    load().close()  # hidden on purpose
    monkeypatch.delenv(VISIBLE)
    disk(monkeypatch, 2**20)
    with pytest.raises(LemError, match=r"shared memory: /dev/shm, where 2 processes .* less than 1\.0 GiB\. Remedy: "):
        load(tensor_parallel_size=2)
    for board in machine.boards:
        board.processes, board.persistence = [Process(999_998)], 0
    machine.apply()
    load().close()  # warnings are for `lem doctor`
    machine.init_error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    machine.apply()
    load().close()  # as is a failure that the engine itself may not mind
    needing(monkeypatch)
    monkeypatch.setenv(VISIBLE, "5")
    load().close()  # a backend that needs nothing


def test_every_finding_is_a_sentence_and_every_remedy_one_line(machine: Machine, tmp_path: Path) -> None:
    for name in backends.backend_names():
        for check in preflight.run(name, {}, tmp_path):
            assert re.fullmatch(r"\S.*[.]", check.finding) and "\n" not in check.finding, check
            assert check.remedy is None or re.fullmatch(r"\S.*[^.]", check.remedy), check


def test_lines_are_in_columns() -> None:
    checks = [Check("a", "ok", "Well."), Check("long name", "failure", "Ill.", "type this")]
    assert preflight.lines(checks) == ["  ok       a          Well.", "  failure  long name  Ill. Remedy: type this"]


def test_the_doctor_ends_with_1_when_something_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(energy, "source_names", lambda: ["nvml", "rapl"])  # none that starts a thread
    assert main(["doctor", "--backend", "fake", "-p", "tokens_per_s=5"]) == 0
    assert re.search(r"^  ok       engine {16}fake is a part of lem_kit\.$", capsys.readouterr().out, re.M)
    monkeypatch.setenv(VISIBLE, "9")
    assert main(["doctor"]) == 1
    assert "\n  failure  CUDA_VISIBLE_DEVICES  '9': '9' names no GPU" in capsys.readouterr().out
    assert main(["doctor", "-p", "a=1"]) == 1
    assert capsys.readouterr().err == "lem: -p is an argument of an engine: say which one with --backend NAME.\n"


def test_looking_imports_no_engine(tmp_path: Path) -> None:
    """In a process of its own, on simulated boards that it finds where the driver would be."""
    machine = Machine([h100(latencies=()), a100(latencies=())])
    machine.write(tmp_path / "boards")
    code = (
        "import sys, time; began = time.perf_counter()\n"
        "from lem_kit import preflight\n"
        f"checks = [check for name in {backends.backend_names()} for check in preflight.run(name)]\n"
        "print([c.finding for c in checks if c.name == 'GPU'][0])\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])\n"
        "print(f'{time.perf_counter() - began:.3f} s', file=sys.stderr)"
    )
    environ = {**os.environ, **machine.environment(tmp_path / "boards")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ, cwd=tmp_path
    )
    found, imported = done.stdout.splitlines()
    assert found == "Driver 580.95.05: GPU 0 (NVIDIA H100 80GB HBM3), GPU 1 (NVIDIA A100-SXM4-80GB)."
    assert imported == "[]"
    print(
        f"{len(backends.backend_names())} backends in {done.stderr.strip()}"
    )  # with the import and the interpreter's own start
