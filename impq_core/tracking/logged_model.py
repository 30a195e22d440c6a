"""Exports as LoggedModels of MLflow: they name the folder, and copy no weights."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from impq_core.errors import ImpqError
from impq_core.hookspecs import hookimpl
from impq_core.runs.folder import RunFolder
from impq_core.tracking.pages import text_name
from impq_core.tracking.store import check_store

if TYPE_CHECKING:
    from impq_core.results import Exported


class ExportTracker:
    """Registers an export with the MLflow run that its folder says it had; a run that has none is left alone."""

    @hookimpl
    def impq_exported(self, exported: Exported, run: Path) -> None:
        """Make an external LoggedModel with the export's sizes and score, and tie it to the run.

        Raises:
            ImpqError: the store does not answer, or is gone.
        """
        folder = RunFolder(run)
        if not folder.tracking.exists():
            return
        known = folder.read_json(folder.tracking)
        uri, run_id = known["uri"], known["run_id"]
        check_store(uri)
        if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
            raise ImpqError(f"tracking store {uri} is gone")  # MLflow would make an empty one
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import LoggedModelOutput, Metric

        client = MlflowClient(uri)
        kept = client.get_run(run_id)
        name = re.sub(r"[/:.%\"'\s]+", "-", f"{kept.info.run_name} {exported.format}")  # what MLflow takes
        params = {"format": exported.format, "folder": exported.folder.absolute(), "bytes": exported.nbytes,
                  "bits": f"{folder.read_space().nominal_bits(exported.nbytes):.4g}"}
        if exported.file_bytes:
            params["file_bytes"] = exported.file_bytes
        model = client.create_logged_model(
            kept.info.experiment_id, name, source_run_id=run_id, model_type="impq",
            tags={"mlflow.model.isExternal": "true", "impq.folder": str(exported.folder.absolute())},
            params={key: str(value) for key, value in params.items()})
        if exported.score:
            score, now = exported.score, int(time.time() * 1000)
            numbers = {"nll": score.nll, "perplexity": score.perplexity, "kl": score.kl, "top1_agreement": score.top1}
            about = {"model_id": model.model_id, "run_id": run_id,
                     "dataset_name": text_name(folder.read_config().evaluation),
                     "dataset_digest": folder.read_json(folder.provenance)["evaluation_digest"]}
            # The run's own nll is of widths quantized behind a prefix at the widest: another name keeps it apart.
            client.log_batch(run_id, [Metric(f"exported_{key}", value, now, 0, **about)
                                      for key, value in numbers.items()])
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
