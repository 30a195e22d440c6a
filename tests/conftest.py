"""Fixtures: tiny models and texts, and caches and stores apart from the user's own."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from impq_core.config import RunConfig, TextConfig
from impq_core.runs.pipeline import run
from impq_core.testing import made_text, tiny_model
from impq_core.testing.device import StandIn, device_there
from impq_core.tracking.store import create_store, sqlite_file

if TYPE_CHECKING:
    from scenes import World
    from selenium.webdriver import Chrome

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--window-size=1900,1400")
"""Flags of Chromium."""

# The matrices are tiny: more threads only wait for each other. Commands that the tests start inherit the variables.
torch.set_num_threads(1)
for library in ("OMP", "MKL", "OPENBLAS"):
    os.environ[f"{library}_NUM_THREADS"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What is loaded before a file's tests stays: each run collects garbage, and would look through all libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype ``auto`` is float32, whatever the processor can do."""
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path_factory.mktemp("cache") / "impq"
    monkeypatch.setenv("IMPQ_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracking store of the user's environment, and no credentials that an earlier test handed to MLflow."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_") and name != "MLFLOW_DISABLE_TELEMETRY"]:
        monkeypatch.delenv(name)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that the variable is removed again, if a test sets it
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """A function that writes an empty MLflow store, which is built once: MLflow's migrations take seconds."""
    built = tmp_path_factory.mktemp("store") / "mlflow.db"

    def write(path: Path) -> None:
        if not built.exists():
            create_store(f"sqlite:///{built}")
        shutil.copy(built, path)

    return write


@pytest.fixture(autouse=True)
def copied_store(request: pytest.FixtureRequest, empty_store: Callable[[Path], None],
                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers copy the empty store instead of building one, except in tests marked ``builds_store``."""
    def create(uri: str) -> None:
        path = sqlite_file(uri)
        if path is not None and not path.exists():
            empty_store(path)

    if request.node.get_closest_marker("builds_store") is None:
        monkeypatch.setattr("impq_core.tracking.tracker.create_store", create)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A calibration and an evaluation text, the same on every machine."""
    folder = tmp_path_factory.mktemp("texts")
    paths = folder / "calibration.txt", folder / "evaluation.txt"
    for seed, path in enumerate(paths):
        path.write_text(made_text(seed, 20_000))
    return paths


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", blocks=4)


@pytest.fixture
def tiny_config(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path) -> RunConfig:
    """A whole run that takes seconds. Its plans are those of the estimates, whatever they are worth."""
    return _tiny_config(tiny_llama, texts, tmp_path)


def _tiny_config(model: Path, texts: tuple[Path, Path], folder: Path) -> RunConfig:
    return RunConfig(model=str(model), bits=(2, 4), estimator="spqe", granularity="block", fallback="no",
                     calibration=TextConfig(str(texts[0]), 8, 48), game_windows=4,
                     evaluation=TextConfig(str(texts[1]), 6, 48), dtype="float32", output=str(folder / "runs"),
                     tracking_uri=f"sqlite:///{folder}/mlflow.db",
                     options={"estimator": {"permutations": 4}, "backend": {"grid": "min-max"}})


@pytest.fixture(scope="session")
def tiny_variants(tiny_llama: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the variants of ``tiny_config``."""
    folder = tmp_path_factory.mktemp("variants")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPQ_CACHE", str(folder / "cache"))
        run(replace(_tiny_config(tiny_llama, texts, folder), estimator="random", allocator="greedy",
                    options={"backend": {"grid": "min-max"}}))
    return folder / "cache"


@pytest.fixture
def variants(cache: Path, tiny_variants: Path) -> None:
    """The variants of ``tiny_config`` are in the test's cache, for tests that are not about quantizing."""
    shutil.copytree(tiny_variants, cache, ignore=shutil.ignore_patterns("score-*"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A folder with a run, an estimate, an export and a sweep in it, to be reset before it is used."""
    from scenes import World

    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run of the test file's fixture ``finished``, to be measured."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def device() -> Iterator[StandIn]:
    """A stand-in for an accelerator."""
    with device_there() as there:
        yield there


@pytest.fixture
def chrome(tmp_path: Path) -> Iterator[Chrome]:
    """Headless Chromium; the test is skipped where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver on the PATH (Debian: apt-get install chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install 'impq[browser]')")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
