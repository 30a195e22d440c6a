"""The folder of a run: the one module that knows the names of its files."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from impq_core.budget import FileAccount
from impq_core.config import RunConfig, read_toml
from impq_core.costs import Metering
from impq_core.credentials import without_secret
from impq_core.errors import ImpqError, one_line
from impq_core.files import scratch_folder, write_text
from impq_core.results import Evaluation, RunResult
from impq_core.space import SearchSpace
from impq_core.types import Measurements, Plan, SensitivityEstimate
from impq_core.uniform_test import UniformTest

T = TypeVar("T")

SWEEP = "sweep.json"
"""The file of a sweep's folder that holds the values of each varied setting."""

CHILDREN = "runs"
"""The folder of a sweep's runs, and of those of a run's further budgets."""

MEASURED = "measured"
"""The folder of a sweep with its measurements: a folder for each backend and estimator."""


@dataclass(frozen=True)
class Cost:
    """The content of cost.json.

    Args:
        forwards: cost of the search in full-model forwards.
        seconds: by stage.
        measured_loss: the plan's loss in the game, nats per token; None if there was no game, or if a run of 0.5 or
            before wrote the file.
        rest_bytes: bytes of what is in no layer; None if a run of 0.5 or before wrote the file.
    """

    forwards: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    measured_loss: float | None = None
    rest_bytes: int | None = None


@dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    def create(cls, parent: Path, files: Mapping[str, str], name: str = "") -> RunFolder:
        """Make a run folder, which appears with all its files at once.

        Args:
            parent: the output folder; it is made if it is missing.
            files: texts by file name.
            name: name of the run folder; the time and a random suffix by default.

        Raises:
            ImpqError: the folder cannot be written.
        """
        folder = (parent / (name or f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}")).absolute()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with scratch_folder(parent, folder.name) as scratch:
                made = scratch / "run"
                made.mkdir()
                for file, text in files.items():
                    write_text(made / file, text)
                made.rename(folder)
        except OSError as error:
            raise ImpqError(f"the output folder {parent} cannot be written: {error.strerror}") from error
        return cls(folder)

    @classmethod
    def open(cls, path: str | Path, *needed: str) -> RunFolder:
        """An existing run folder; raises ImpqError if it lacks its configuration or one of the needed files."""
        folder = cls(Path(path).expanduser().absolute())
        for name in ("impq.toml", *needed):
            if not (folder.path / name).is_file():
                raise ImpqError(f"{path} is no run folder that this command can use: it has no {name}")
        return folder

    @property
    def config(self) -> Path:
        """The resolved configuration (impq.toml)."""
        return self.path / "impq.toml"

    @property
    def provenance(self) -> Path:
        """The identity of the run (``RunKey``): digests, options and versions."""
        return self.path / "provenance.json"

    @property
    def space(self) -> Path:
        """The search space of plans."""
        return self.path / "space.json"

    @property
    def costs(self) -> Path:
        """What the meters found; missing if the run has none."""
        return self.path / "costs.json"

    @property
    def variants(self) -> Path:
        """The backend's record of every variant."""
        return self.path / "variants.json"

    @property
    def losses(self) -> Path:
        """The log of measured losses."""
        return self.path / "measurements.jsonl"

    @property
    def slopes(self) -> Path:
        """The log of gradients taken."""
        return self.path / "gradients.jsonl"

    @property
    def measurements(self) -> Path:
        """The measured losses that a surrogate fits."""
        return self.path / "measurements.npz"

    @property
    def estimate(self) -> Path:
        """The estimate."""
        return self.path / "estimate.npz"

    @property
    def plan(self) -> Path:
        """The plan."""
        return self.path / "plan.json"

    @property
    def held_back_scores(self) -> Path:
        """The log of scores on held-back calibration windows."""
        return self.path / "held-back.jsonl"

    @property
    def uniform_test(self) -> Path:
        """The plan against the uniform model of its budget; missing if there was nothing to test."""
        return self.path / "uniform-test.json"

    @property
    def estimated_plan(self) -> Path:
        """The plan of the estimate, if a uniform model took its place."""
        return self.path / "estimated-plan.json"

    @property
    def searched_plan(self) -> Path:
        """Where the plan of the search is written: not over a uniform model that has taken its place, so that a run
        that is stopped while it is resumed keeps its plan."""
        return self.estimated_plan if self.estimated_plan.is_file() else self.plan

    @property
    def scores(self) -> Path:
        """The log of held-out scores."""
        return self.path / "scores.jsonl"

    @property
    def evaluation(self) -> Path:
        """Held-out scores of the plan and its references."""
        return self.path / "evaluation.json"

    @property
    def cost(self) -> Path:
        """Forwards and seconds spent; the plan's loss in the game, and the bytes of what is in no layer."""
        return self.path / "cost.json"

    @property
    def tracking(self) -> Path:
        """Store and id of the MLflow run."""
        return self.path / "mlflow.json"

    @property
    def error(self) -> Path:
        """The traceback of the error that ended the run."""
        return self.path / "error.txt"

    @property
    def figures(self) -> Path:
        """Folder of pictures."""
        return self.path / "figures"

    def read_config(self) -> RunConfig:
        """The configuration; raises UsageError if it cannot be read."""
        return read_toml(self.config)

    def read_json(self, path: Path) -> dict[str, Any]:
        """The data of a JSON file; raises ImpqError if it is missing or no JSON object."""
        try:
            data = json.loads(path.read_text())
            if not isinstance(data, dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError) as error:
            raise ImpqError(f"{path} cannot be read: {error}") from error
        return data

    def write_cost(self, result: RunResult) -> None:
        """Write cost.json."""
        self.write_json(self.cost, asdict(Cost(result.forwards, result.seconds, result.measured_loss,
                                               result.rest_bytes)))

    def read_cost(self) -> Cost:
        """The content of cost.json; raises ImpqError if it cannot be read."""
        def read(path: Path) -> Cost:
            data = self.read_json(path)
            loss, rest = data.get("measured_loss"), data.get("rest_bytes")
            return Cost(float(data["forwards"]), {stage: float(value) for stage, value in data["seconds"].items()},
                        None if loss is None else float(loss), None if rest is None else int(rest))
        return _readable(self.cost, read)

    def write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        write_text(path, json.dumps(data, indent=1) + "\n")

    def read_space(self) -> SearchSpace:
        """The search space of plans; raises ImpqError if it cannot be read."""
        return _readable(self.space, lambda path: SearchSpace.from_dict(self.read_json(path)))

    def read_file_account(self) -> FileAccount | None:
        """The file of an export, if the run's budget bounds it; raises ImpqError if it cannot be read."""
        account = _readable(self.space, lambda path: self.read_json(path).get("file"))
        return _readable(self.space, lambda path: FileAccount(**account)) if account else None

    def read_meterings(self) -> tuple[Metering, ...]:
        """What the meters of the run found; raises ImpqError if it cannot be read."""
        if not self.costs.exists():
            return ()
        return _readable(self.costs, lambda path: tuple(map(Metering.from_dict, self.read_json(path)["meters"])))

    def read_estimate(self) -> SensitivityEstimate:
        """The estimate; raises ImpqError if it cannot be read."""
        return _readable(self.estimate, SensitivityEstimate.load)

    def read_evaluation(self) -> Evaluation:
        """The held-out evaluation; raises ImpqError if it cannot be read."""
        return _readable(self.evaluation, lambda path: Evaluation.from_dict(self.read_json(path)))

    def read_uniform_test(self) -> UniformTest | None:
        """The plan against the uniform model of its budget, if it was tested; raises ImpqError if it cannot be read."""
        if not self.uniform_test.is_file():
            return None
        return _readable(self.uniform_test, lambda path: UniformTest.from_dict(self.read_json(path)))

    def read_plan(self) -> Plan:
        """The plan as the run saved it; raises ImpqError if it cannot be read."""
        space = self.read_space()
        return _readable(self.plan, lambda path: Plan.restore(path, space))

    def read_measurements(self) -> Measurements:
        """The measured losses; raises ImpqError if there are none, or if they cannot be read."""
        if not self.measurements.is_file():
            raise ImpqError(f"{self.path} has no losses to fit: it has no {self.measurements.name} (estimators that "
                            "make their own estimate leave none); take a run of one that measures losses, such as "
                            "spqe")
        return _readable(self.measurements, Measurements.load)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder until the block ends; raises ImpqError if another process works in it."""
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise ImpqError(f"another process works in {self.path}: wait for it, or stop it") from error


def recorded(config: RunConfig) -> RunConfig:
    """A configuration as files hold it: without the password of the tracking store."""
    return replace(config, tracking_uri=without_secret(config.tracking_uri))


def _readable(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except ImpqError as error:
        named = str(path) in str(error)
        raise ImpqError(str(error) if named else f"{path} cannot be used: {error}") from error
    except Exception as error:  # zip, json and numpy each raise their own
        raise ImpqError(f"{path} cannot be read: {one_line(error)}") from error
