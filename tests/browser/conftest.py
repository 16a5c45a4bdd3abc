"""A JupyterLab of its own and a browser for the tests of what a person sees. `make test-browser` runs them.

The one idea: the server has a home, a configuration and a token of its own, on a free port of the loopback, and its meter
is a recording; so no user's settings enter, and every machine has power to show. Screenshots are in build/browser/.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / "build" / "browser"
# Chromium in a container has no sandbox, and none of its own business with the network.
FLAGS = (
    "--no-sandbox",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 1024, "height": 640}
RUNNING = "Array.from(document.querySelectorAll('.jp-InputPrompt')).filter(p => p.textContent.includes('*')).length"


class Lab:
    """A running server: `folder` is what it shows."""

    def __init__(self, folder: Path, url: str, token: str) -> None:
        self.folder, self.url, self.token = folder, url, token

    def put(self, name: str, *cells: str) -> Path:
        """A notebook of these code cells, not run yet."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        notebook.metadata["language_info"] = {"name": "python"}  # or JupyterLab asks which kernel is meant
        nbformat.write(notebook, self.folder / name)
        return self.folder / name


class Notebook:
    """A notebook that is open in a page of the browser."""

    def __init__(self, page: Any, lab: Lab, path: Path) -> None:
        self.page, self.path = page, path
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(f"{lab.url}/lab/tree/{path.name}?reset&token={lab.token}")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.get_by_text("| Idle").wait_for(timeout=60_000)  # in the status bar: the kernel is there, and listens

    def menu(self, name: str, item: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel", has_text=name).first.click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()

    def run_all(self, wait: bool = True) -> None:
        self.menu("Run", "Run All Cells")
        self.page.wait_for_function(f"{RUNNING} > 0 || document.querySelector('.jp-OutputArea-output')")
        if wait:
            self.finished()

    def finished(self) -> None:
        """Wait until no cell is running or waiting to run."""
        self.page.wait_for_function(f"{RUNNING} === 0", timeout=60_000)

    def output(self, cell: int) -> Any:
        """The output area of the code cell of this number, from 0."""
        return self.page.locator(".jp-CodeCell").nth(cell).locator(".jp-OutputArea").first

    def save(self) -> Any:
        """Save by the menu; the notebook as it is in the file then, which is strict JSON or raises."""
        before = self.path.stat().st_mtime_ns
        self.menu("File", "Save Notebook")
        until = time.monotonic() + 20
        while self.path.stat().st_mtime_ns == before:
            assert time.monotonic() < until, "the notebook was not saved"
            time.sleep(0.1)
        time.sleep(0.3)  # the server writes a file in place

        def refuse(constant: str) -> None:
            raise AssertionError(f"the saved notebook holds {constant}")

        return json.loads(self.path.read_text(encoding="utf-8"), parse_constant=refuse)

    def picture(self, name: str) -> None:
        """Screenshots of the whole window: as it is, and as narrow as on a small laptop."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png")
        self.page.set_viewport_size(NARROW)
        self.page.screenshot(path=PICTURES / f"{name}-narrow.png")
        self.page.set_viewport_size(WIDE)


def environment(home: Path) -> dict[str, str]:
    """A process's environment in which nothing of the user's is found, and a recording is the meter."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "LEM_KIT", "IPYTHON", "XDG"))
    }
    folders = {
        "HOME": "",
        "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    ours = {"LEM_KIT_SOURCES": f"replay={ROOT / 'data/example/power.csv'}", "PLOTLY_RENDERER": "plotly_mimetype"}
    return {**kept, **{name: str(home / folder) for name, folder in folders.items()}, **ours}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("notebooks")
    news = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # a question about news would lie over the notebook
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    log = (home / "server.log").open("w")
    given = {**environment(home), "JUPYTER_TOKEN": token}  # not in the arguments, which every process can read
    server = subprocess.Popen(command, cwd=folder, env=given, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while not _answers(f"{url}/api/status?token={token}"):
            assert server.poll() is None and time.monotonic() < until, (home / "server.log").read_text()[-3000:]
            time.sleep(0.2)
        yield Lab(folder, url, token)
    finally:
        server.send_signal(signal.SIGTERM)  # it ends its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        log.close()


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=2).status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "there is no Chromium on PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    context = browser.new_context(viewport=WIDE)
    context.set_default_timeout(20_000)
    page = context.new_page()
    yield page
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"last-{request.node.name}.png")  # what a test that failed was looking at
    context.close()
