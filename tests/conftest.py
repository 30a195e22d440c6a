"""Tiny models and texts that every test shares, and caches that keep a user's own clean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from impq_core.config import RunConfig, TextConfig
from impq_core.testing import made_text, tiny_model

if TYPE_CHECKING:
    from scenes import World

torch.set_num_threads(1)  # tiny matrices; more threads only wait for each other on a busy machine
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


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
        monkeypatch.setenv(name, "")  # so that it is taken out again, whoever sets it
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A calibration and an evaluation text, the same on every machine."""
    folder = tmp_path_factory.mktemp("texts")
    paths = folder / "calibration.txt", folder / "evaluation.txt"
    for seed, path in enumerate(paths):
        path.write_text(made_text(seed, 100_000))
    return paths


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", blocks=4)


@pytest.fixture
def tiny_config(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path) -> RunConfig:
    """A whole run that takes seconds."""
    return RunConfig(model=str(tiny_llama), bits=(2, 4), estimator="spqe", granularity="block",
                     calibration=TextConfig(str(texts[0]), 8, 48), game_windows=4,
                     evaluation=TextConfig(str(texts[1]), 6, 48), dtype="float32", output=str(tmp_path / "runs"),
                     tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
                     options={"estimator": {"permutations": 4}, "backend": {"clip_search": False}})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A folder with a run, an estimate, an export and a sweep in it, to be reset before it is used."""
    from scenes import World

    return World.make(tmp_path_factory.mktemp("world"))
