"""impq and the example plugin as installed wheels: `tox -e thirdparty` builds and installs both, then runs this."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import impq_core
from impq_core.testing import tiny_model

pytestmark = pytest.mark.thirdparty
SMALL = ("--calibration", "calibration.txt", "--calibration-windows", "8", "--calibration-length", "32",
         "--evaluation", "evaluation.txt", "--evaluation-windows", "4", "--evaluation-length", "32",
         "--game-windows", "4")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and texts."""
    folder = tmp_path_factory.mktemp("here")
    tiny_model(folder / "model")
    for name, start in (("calibration", 0), ("evaluation", 5000)):
        (folder / f"{name}.txt").write_text(" ".join(str(n * n) for n in range(start, start + 1000)))
    return folder


def impq(here: Path, *arguments: str) -> str:
    command = Path(sys.executable).with_name("impq")
    done = subprocess.run([command, *arguments], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_are_wheels() -> None:
    assert "site-packages" in impq_core.__file__
    for name in ("impq", "impq-example"):
        files = distribution(name).files or []
        assert any(file.name == "WHEEL" for file in files) and not any("editable" in file.name for file in files)


def test_its_parts_are_listed_and_none_is_dropped(here: Path) -> None:
    listed = impq(here, "plugins", "--options")
    assert listed.count("(impq-example:example)") == 3 and "not used" not in listed
    assert "group_size=32  weights of a row that share a scale." in listed


def test_a_run_with_all_three(here: Path) -> None:
    output = impq(here, "run", "--model", "model", "--estimator", "example", "--allocator", "example", "--backend",
                "example", "-o", "group_size=16", *SMALL)
    assert "bits with example" in output and "uniform 4" in output
    [folder] = (here / "impq-runs").iterdir()
    assert 'estimator = "example"' in (folder / "impq.toml").read_text()


def test_what_is_written_anew_is_found_too(here: Path) -> None:
    impq(here, "plugins", "new", "mine.py")
    assert "bits with example" in impq(here, "run", "--model", "model", "--plugin", "mine.py", "--estimator", "mine",
                                       "--backend", "example", *SMALL)
