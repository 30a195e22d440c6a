"""Exports as LoggedModels of MLflow, which name the folder and copy no weights."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from impq_core.hookspecs import hookimpl
from impq_core.runs.folder import RunFolder
from impq_core.tracking.measured import tracked_run
from impq_core.tracking.pages import held_out_name

if TYPE_CHECKING:
    from impq_core.results import Exported


class ExportTracker:
    """Registers exports with the MLflow runs named in their run folders; does nothing for untracked runs."""

    @hookimpl
    def impq_exported(self, exported: Exported, run: Path) -> None:
        """Make an external LoggedModel with the export's sizes and score, and tie it to the run.

        Raises:
            ImpqError: the store does not answer, or its file is gone.
        """
        folder = RunFolder(run)
        tracked = tracked_run(folder)
        if tracked is None:
            return
        client, run_id = tracked
        from mlflow.entities import LoggedModelOutput, Metric

        kept = client.get_run(run_id)
        name = re.sub(r"[/:.%\"'\s]+", "-", f"{kept.info.run_name} {exported.format}")  # characters that MLflow accepts
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
                     "dataset_name": held_out_name(folder.read_config()),
                     "dataset_digest": folder.read_json(folder.provenance)["evaluation"]["tokens"].partition(" ")[0]}
            # Another name than the run's own nll, which is of variants quantized behind a prefix at the widest width.
            client.log_batch(run_id, [Metric(f"exported_{key}", value, now, 0, **about)
                                      for key, value in numbers.items()])
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
