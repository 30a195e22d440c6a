"""MLflow, as an observer of a run: it watches, and the run would go on without it."""

from __future__ import annotations

import os
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from impq_core.pipeline import RunResult
    from impq_core.space import FloatArray, IntArray, SearchSpace
    from impq_core.types import Measurements, Plan, SensitivityEstimate

CONNECT_SECONDS = 5.0
"""How long a tracking server may take to answer before a run is refused."""


def store_uri(uri: str) -> str:
    """The tracking URI meant: ``mlflow.db`` here by default, and SQLite files by their absolute path."""
    path = uri.removeprefix("sqlite:///") if uri else "mlflow.db"
    if not uri or uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(path).absolute()}"
    return uri


def check_store(uri: str) -> None:
    """Refuse a store that cannot be written or does not answer, without waiting for MLflow's many retries.

    Raises:
        ImpqError: the folder of a SQLite file is missing, a server does not answer, or the URI is of another kind.
    """
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        folder = Path(uri.removeprefix("sqlite:///")).parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ImpqError(f"tracking store {uri}: the folder {folder} is missing or cannot be written")
    elif parts.scheme in ("http", "https"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=CONNECT_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # it answers; what it answers is MLflow's business
        except (OSError, ValueError) as error:
            raise ImpqError(f"tracking server {uri} does not answer ({getattr(error, 'reason', error)}); "
                            "use --tracking-uri none to run without it") from error
    elif parts.scheme not in ("postgresql", "mysql", "mssql", "databricks") and "+" not in parts.scheme:
        raise ImpqError(f"tracking store '{uri}' is not understood: give sqlite:///FILE, http(s)://HOST, or none")


class Tracker:
    """Keeps one impq run as one MLflow run; what later fails to be logged is reported and the run goes on."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri, self._experiment_name = store_uri(uri), experiment
        self.run_id = ""
        self._folder = Path()
        self._evaluations = 0

    @hookimpl
    def impq_run_started(self, config: RunConfig, space: SearchSpace, folder: Path) -> None:
        """Open the run before the weights are loaded, so that nothing is ever computed untracked."""
        check_store(self.uri)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import logging

        for chatty in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._folder = folder
        try:
            with _store_lock(self.uri):
                self._client: MlflowClient = MlflowClient(self.uri)
                run = self._client.create_run(self._experiment(), run_name=folder.name)
            self.run_id = run.info.run_id
            self._client.log_batch(self.run_id, params=_params(_flat(config, space)))
            self._client.log_artifact(self.run_id, str(folder / "impq.toml"))
        except (MlflowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ImpqError(f"tracking store {self.uri} cannot be used: {reason}") from error

    def _experiment(self) -> str:
        known = self._client.get_experiment_by_name(self._experiment_name)
        if known is not None:
            if known.lifecycle_stage != "active":
                raise ImpqError(f"the MLflow experiment '{self._experiment_name}' is deleted: restore it or take "
                                "another --experiment")
            return str(known.experiment_id)
        location = None
        if self.uri.startswith("sqlite:"):
            location = (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        return str(self._client.create_experiment(self._experiment_name, artifact_location=location))

    @hookimpl
    def impq_variants_ready(self, nbytes: int, seconds: float) -> None:
        """Size of the bank."""
        self._metrics({"bank_bytes": nbytes})

    @hookimpl
    def impq_measured(self, picks: IntArray, losses: FloatArray, forwards: float) -> None:
        """Every loss as a step metric, in one batch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric("measured_loss", float(loss), now, self._evaluations + i) for i, loss in enumerate(losses)]
        self._evaluations += len(losses)
        batch.append(Metric("forwards", forwards, now, self._evaluations))
        self._log(batch)

    @hookimpl
    def impq_estimate_ready(self, estimate: SensitivityEstimate, measurements: Measurements | None) -> None:
        """Convergence: the mean standard error of the Shapley values as permutations come in."""
        if measurements is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._log([Metric("shapley_stderr", float(value), now, step)
                   for step, value in enumerate(measurements.convergence(), start=2)])

    @hookimpl
    def impq_plan_ready(self, plan: Plan) -> None:
        """Size and prediction of the plan."""
        numbers = {"bytes": plan.nbytes, "bits_nominal": plan.space.nominal_bits(plan.nbytes),
                   "bits_stored": plan.space.bits_per_weight(plan.nbytes), "predicted_loss": plan.predicted_loss,
                   "optimality_gap": plan.gap}
        self._metrics({name: value for name, value in numbers.items() if value is not None})

    @hookimpl
    def impq_run_finished(self, result: RunResult) -> None:
        """Quality, cost, figures and every file of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        from impq_core.figures import draw_figures

        score = result.evaluation.plan
        numbers = {"nll": score.nll, "nll_stderr": score.stderr, "perplexity": score.perplexity, "kl": score.kl,
                   "top1_agreement": score.top1, "search_forwards": result.forwards,
                   "model_bytes": result.model_bytes, "evaluations": len(result.measurements or ())}
        if result.measured_loss is not None:
            numbers["measured_plan_loss"] = result.measured_loss
        if result.plan.predicted_loss is not None and result.measured_loss is not None:
            numbers["surrogate_error"] = result.plan.predicted_loss - result.measured_loss
        numbers |= {f"seconds_{stage}": seconds for stage, seconds in result.seconds.items()}
        for row in result.evaluation.rows[1:]:
            numbers[f"reference_nll/{row.name.replace(' ', '_').replace('/', '_')}"] = row.nll
        self._metrics(numbers)
        inputs = []
        for context in result.digests:
            text = getattr(result.config, context)
            dataset = Dataset(name=f"{text.source}-{context}", digest=result.digests[context], source_type="local",
                              source=text.source)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        self._client.log_inputs(self.run_id, datasets=inputs)
        draw_figures(result, result.folder / "figures")
        self._end("FINISHED")

    @hookimpl
    def impq_run_failed(self, error: BaseException) -> None:
        """KILLED where somebody stopped the run, else FAILED; the traceback and the log go along."""
        if self.run_id:
            self._client.set_tag(self.run_id, "error", "".join(traceback.format_exception_only(error)).strip()[:4000])
            self._end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _metrics(self, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._log([Metric(name, float(value), now, 0) for name, value in numbers.items()])

    def _log(self, metrics: list[Any]) -> None:
        for start in range(0, len(metrics), 1000):  # the store's limit for one batch
            self._client.log_batch(self.run_id, metrics=metrics[start:start + 1000])

    def _end(self, status: str) -> None:
        try:
            self._client.log_artifacts(self.run_id, str(self._folder))
        finally:
            self._client.set_terminated(self.run_id, status)


def _store_lock(uri: str) -> FileLock:
    """SQLite stores are created by one process at a time: MLflow's own set-up fails when several race for it."""
    if uri.startswith("sqlite:"):
        return FileLock(uri.removeprefix("sqlite:///") + ".lock")
    import tempfile

    return FileLock(Path(tempfile.gettempdir()) / "impq-tracking.lock")


def _flat(config: RunConfig, space: SearchSpace) -> Iterable[tuple[str, Any]]:
    from dataclasses import asdict

    for key, value in asdict(config).items():
        if key == "options":
            for role, options in value.items():
                yield from ((f"{role}.{name}", option) for name, option in options.items())
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield key, ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else value
    yield "layers", len(space)
    yield "quantizable_weights", space.parameters


def _params(pairs: Iterable[tuple[str, Any]]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, str(value)[:6000]) for key, value in pairs]
