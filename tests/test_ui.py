"""The MLflow pages as a user meets them, in headless Chromium against the server that ``impq ui`` starts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from impq_core.config import RunConfig
from impq_core.exports.export import export_run
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import run
from impq_core.runs.sweep import Sweep, run_sweep
from impq_core.tracking.logged_model import ExportTracker
from impq_core.tracking.tracker import Tracker

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

pytestmark = pytest.mark.browser

FIRST, SECOND = "spqe auto qp gptq 3bits", "hawq qp gptq 2.5bits"
SECONDS = 60.0
"""Time limit of a page in seconds, for a busy machine."""


def link(text: str) -> str:
    return f"//a[normalize-space()='{text}']"


class Pages:
    """Chromium at a server's pages: everything waits until it is there."""

    def __init__(self, chrome: Chrome) -> None:
        self.chrome = chrome

    def wait(self, found: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                if value := found():
                    return value
            except Exception as error:  # React redraws: what was found a moment ago may be gone
                if "selenium" not in type(error).__module__:
                    raise
            time.sleep(0.2)
        raise AssertionError(f"{what} does not show at {self.chrome.current_url}; the page says:\n{self.text()}")

    def see(self, xpath: str) -> WebElement:
        return self.wait(lambda: next(filter(lambda e: e.is_displayed(), self.chrome.find_elements("xpath", xpath)),
                                      None), xpath)

    def click(self, xpath: str) -> None:
        def clicked() -> bool:
            self.see(xpath).click()
            return True
        self.wait(clicked, xpath)

    def says(self, *words: str) -> None:
        for word in words:
            self.wait(lambda word=word: word in self.text(), f"'{word}'")

    def text(self) -> str:
        return self.chrome.find_element("tag name", "body").text

    def drawn(self, xpath: str) -> None:
        """Wait for a picture that has pixels: a broken one has none."""
        self.wait(lambda: int(self.see(xpath).get_property("naturalWidth") or 0) > 100, xpath)


@pytest.fixture
def pages(chrome: Chrome) -> Pages:
    return Pages(chrome)


@pytest.fixture
def served(tiny_config: RunConfig, tmp_path: Path) -> Iterator[str]:
    """Two runs, an export and a sweep in a store, and the address that ``impq ui`` prints for it."""
    plugins = Plugins()
    for observer in (Tracker(tiny_config.tracking_uri, tiny_config.experiment), ExportTracker()):
        plugins.watch(observer)
    quick = {"backend": {"grid": "min-max"}}
    first = run(tiny_config, plugins)
    export_run(str(first.folder), "recipe-auto-round", tmp_path / "recipe", plugins)
    run(replace(tiny_config, estimator="hawq", budget="2.5bits", options=quick), plugins)
    run_sweep(Sweep(replace(tiny_config, estimator="random", options=quick), {"budget": ["2.5bits", "3.5bits"]}),
              plugins)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "ui.log"
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, "-m", "impq_core.cli", "ui", "--port", str(port), "--tracking-uri",
                                   tiny_config.tracking_uri], stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
        [address] = re.findall(r"runs of impq: (\S+)", log.read_text())
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # the server and its workers, however they stand
        server.wait(timeout=30)


def test_runs_compare_in_the_pages(pages: Pages, served: str) -> None:
    pages.chrome.get(served)
    for name in (FIRST, SECOND, "sweep: 2 budgets"):
        pages.see(link(name))
    for column in ("nll", "bits_nominal", "bytes", "search_forwards", "estimator", "backend"):
        pages.see(f"//div[@role='columnheader'][normalize-space()='{column}']")

    for name in (FIRST, SECOND):
        pages.click(f"//div[@role='row'][.{link(name)}]//div[contains(@class, 'ag-checkbox-input-wrapper')]")
    pages.click("//button[normalize-space()='Compare']")
    pages.says("Comparing 2 Runs", FIRST, SECOND, "bits_nominal", "bytes", "estimator")  # others are a scroll away
    pages.see("//*[name()='svg'][contains(@class, 'main-svg')][.//*[contains(text(), 'hawq')]]")

    pages.chrome.get(f"{served}&compareRunsMode=CHART")
    pages.says("bytes vs. nll")
    pages.see("//*[name()='svg'][contains(@class, 'main-svg')]")
    pages.says("loss_against_bytes", "widths")
    pages.drawn("//img")

    pages.chrome.get(served)
    pages.click(link(FIRST))
    pages.says("Description", "top-1 agreement", "search_forwards", "calibration.txt", "evaluation.txt",
               "spqe-auto-qp-gptq-3bits-recipe-auto-round")
    pages.click("//*[@role='tab'][normalize-space()='Artifacts']")
    pages.click("//*[text()='figures']")
    pages.click("//*[text()='loss_against_bytes.png']")
    pages.drawn("//img[starts-with(@src, 'blob:')]")
