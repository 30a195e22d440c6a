"""Results as pandas data frames. Columns have the names of the documents' fields (``impq_core.documents``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from impq_core.compare.comparison import Comparison
from impq_core.documents.comparison import ContestDocument
from impq_core.documents.runs import EstimateDocument, EvaluationDocument, PlanDocument
from impq_core.results import Evaluation, RunResult
from impq_core.types import Plan, SensitivityEstimate


@singledispatch
def frame(result: Any) -> Any:
    """The data frame of a result; raises TypeError if it has none."""
    raise TypeError(f"{type(result).__name__} has no data frame")


@frame.register
def _(evaluation: Evaluation) -> Any:
    """A row for each allocation."""
    return _table([_fields(row, "window_nll_nats") for row in EvaluationDocument.of(evaluation).rows])


@frame.register
def _(plan: Plan) -> Any:
    """A row for each layer."""
    return _table([_fields(layer, "linears") for layer in PlanDocument.of(plan).layers])


@frame.register
def _(estimate: SensitivityEstimate) -> Any:
    """A row for each layer and choice. The cost's columns say whether it is a loss."""
    document = EstimateDocument.of(estimate)
    names = ("cost_nats", "cost_stderr_nats") if document.is_nats else ("score", "score_stderr")
    return _table([_fields(cost) for cost in document.costs]).rename(columns=dict(zip(("cost", "cost_stderr"), names,
                                                                                       strict=True)))


@frame.register
def _(result: RunResult) -> Any:
    """One row, so that rows of several runs can be put together."""
    config, plan, evaluation = result.config, result.plan, result.evaluation
    row: dict[str, Any] = {name: getattr(config, name) for name in (
        "model", "backend", "estimate_with", "estimator", "surrogate", "allocator", "granularity", "value", "budget",
        "seed")}
    row |= {"forwards": result.forwards, "size_bytes": None, "bits_nominal": None, "bits_stored": None,
            "predicted": None, "measured_loss_nats": result.measured_loss}
    if plan is not None:
        row |= {"size_bytes": plan.nbytes, "bits_nominal": plan.space.nominal_bits(plan.nbytes),
                "bits_stored": plan.space.bits_per_weight(plan.nbytes), "predicted": plan.predicted_loss}
    score = _fields(EvaluationDocument.of(evaluation).rows[0]) if evaluation else {}
    row |= {name: score.get(name) for name in ("nll_nats", "nll_stderr_nats", "perplexity", "perplexity_stderr",
                                               "kl_nats", "top1_share")}
    return _table([{**row, "folder": str(result.folder)}])


@frame.register
def _(comparison: Comparison) -> Any:
    """A row for each run."""
    return _table([{"model": contest.model, "text": contest.text, **_fields(run, "references")}
                   for contest in map(ContestDocument.of, comparison.contests) for run in contest.runs])


def _fields(document: Any, *without: str) -> dict[str, Any]:
    return {name: value for name, value in vars(document).items() if name not in without}


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    import pandas

    table = pandas.DataFrame(rows)
    unknown = table.columns[table.isna().all()]  # a column of None alone is no number for pandas
    return table.astype(dict.fromkeys(unknown, float))
