"""Content of MLflow's pages: run names, metrics, parameters, notes, texts, and the columns of the runs table."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.config import RunConfig, TextConfig
from impq_core.credentials import without_secret

if TYPE_CHECKING:
    from impq_core.results import RunResult

VIEW = "impq"
"""Key and name of the saved view in every impq experiment."""

VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Experiment tag that holds the view."""

COLUMNS = ("metrics.`nll`", "metrics.`bits_nominal`", "metrics.`bytes`", "metrics.`search_forwards`",
           "params.`estimator`", "params.`backend`", "params.`allocator`", "params.`surrogate`", "params.`budget`",
           "metrics.`kl`", "metrics.`top1_agreement`", "params.`model`", "attributes.`Models`", "attributes.`Dataset`")
"""Columns of the view, after the run's name and time."""

FIGURES = ("loss_against_bytes", "widths", "sensitivities")
"""Figures that the charts of the view show for several runs side by side."""

NOTE_TAG = "mlflow.note.content"
"""Tag that MLflow shows as a description."""

NOTE_LENGTH = 5000
"""Longest value of a tag that every store of MLflow accepts."""


def run_name(config: RunConfig, fitted: bool = True) -> str:
    """Name of a run, made of its components and budget: ``spqe auto qp gptq 3.0bits``.

    Args:
        config: the run.
        fitted: false if the estimator leaves nothing for a surrogate to fit.
    """
    if config.plan:
        return f"given plan, {config.backend}"
    estimator = f"{config.estimator}({config.estimate_with})" if config.estimate_with else config.estimator
    allocator = f"{config.allocator}+{config.refiner}" if config.refine else config.allocator
    surrogate = [config.surrogate] if fitted else []
    return " ".join([estimator, *surrogate, allocator, config.backend, config.budget])


def sweep_name(varied: Mapping[str, Sequence[str]]) -> str:
    """Name of a sweep, made of the settings that vary: ``sweep: 2 estimators, 3 budgets``; or ``target nll+0.1``."""
    if "target" in varied:
        return f"target {', '.join(varied['target'])}"
    counts = [f"{len(values)} {name}s" for name, values in varied.items() if len(values) > 1]
    return f"sweep: {', '.join(counts)}" if counts else "sweep"


def experiment_tags() -> dict[str, str]:
    """Tags of an experiment: its kind, and the view."""
    now = int(time.time() * 1000)
    view = {"name": VIEW, "createdAt": now, "updatedAt": now, "state": json.dumps(_view())}
    return {"mlflow.experimentKind": "custom_model_development", VIEW_TAG: json.dumps(view)}


def _view() -> dict[str, Any]:
    """Columns and charts in the format of MLflow's "Save view". All other charts follow below these."""
    def chart(kind: str, number: int, **what: Any) -> dict[str, Any]:
        return {"uuid": f"{VIEW}-{number}", "type": kind, "metricSectionId": VIEW, "runsCountToCompare": 100,
                "deleted": False, "isGenerated": False, **what}

    name_column = "attributes.`Run Name`"
    charts = [chart("SCATTER", 0, xaxis={"key": "bytes", "type": "METRIC"}, yaxis={"key": "nll", "type": "METRIC"})]
    charts += [chart("BAR", number, metricKey=name, displayName=name)
               for number, name in enumerate(("nll", "bits_nominal", "search_forwards"), len(charts))]
    charts += [chart("IMAGE", number, imageKeys=[name], displayName=name, step=0, showRunParams=False)
               for number, name in enumerate(FIGURES, len(charts))]
    section = {"uuid": VIEW, "name": "impq", "display": True, "isReordered": True, "deleted": False,
               "isGenerated": False}
    return {"selectedColumns": COLUMNS, "columnOrder": [name_column, "runDateAndNestInfo", *COLUMNS],
            "columnWidths": {name_column: 260, "metrics.`search_forwards`": 130},
            "compareRunCharts": charts, "compareRunSections": [section], "isAccordionReordered": True}


def experiment_note(experiment_id: str) -> str:
    """Description of an experiment: a link to the view, from whatever page MLflow opens first."""
    return f"Runs of impq: [the columns and charts that matter]({view_path(experiment_id)})"


def view_path(experiment_id: str) -> str:
    """Path, on a server, of an experiment's runs in the view; by default MLflow opens its GenAI pages."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"


def run_note(result: RunResult) -> str:
    """The run in a few lines of Markdown, with its evaluation table."""
    from impq_core.terminal import evaluation_rows, score_line, summary

    config, evaluation = result.config, result.evaluation
    lines = [f"{Path(config.model).name}, {config.backend}, budget {config.budget}"
             + (f": **{score_line(evaluation.plan)}**" if evaluation else ""), "",
             *(f"- {line}" for line in summary(result))]
    if evaluation is not None:
        lines += ["", markdown_table(*evaluation_rows(evaluation))]
    return shortened("\n".join([*lines, "", f"Folder `{result.folder}`"]))


def shortened(note: str) -> str:
    """A note cut between lines to the length that MLflow accepts."""
    return note if len(note) <= NOTE_LENGTH else note[:NOTE_LENGTH].rpartition("\n")[0]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: text in the first column, numbers in the others."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def text_name(text: TextConfig) -> str:
    """Name of a text in the dataset column; of a file, without its folder."""
    return ", ".join(Path(each.source).name if Path(each.source).is_absolute() else each.source for each in text.texts)


def held_out_name(config: RunConfig) -> str:
    """Name of the first held-out text, on which exports are scored, in the dataset column."""
    return text_name(replace(config.evaluation, source=config.evaluation.texts[0].source))


def text_inputs(result: RunResult) -> list[Any]:
    """Texts of a run as dataset inputs of MLflow."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for name, digest in result.digests.items():
        context, _, other = name.partition(" ")
        text: TextConfig = getattr(result.config, context)
        if context == "evaluation":  # of several texts, the first or the one of that name
            text = replace(text, source=next(each.source for each in text.texts if other in ("", each.name)))
        profile = json.dumps({"windows": text.windows, "tokens_per_window": text.length, "seed": text.seed})
        dataset = Dataset(name=text_name(text), digest=digest, source_type="local",
                          source=json.dumps({"uri": text.shown}), profile=profile)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return inputs


def run_numbers(result: RunResult) -> dict[str, float]:
    """Results of a run as MLflow metrics."""
    numbers: dict[str, float] = {"search_forwards": result.forwards, "evaluations": len(result.measurements or ())}
    if result.measured_loss is not None:
        numbers["measured_plan_loss"] = result.measured_loss
    if result.plan is not None:
        if result.model_bytes is not None:
            numbers["model_bytes"] = result.model_bytes
        numbers |= {f"cost/{cost.name}": cost.of(result.plan.pick) for cost in result.plan.costs}
        if result.plan.gap is not None:  # here, because a uniform model in place of the plan has none
            numbers["optimality_gap"] = result.plan.gap
        if result.plan.is_loss and result.plan.predicted_loss is not None and result.measured_loss is not None:
            numbers["surrogate_error"] = result.plan.predicted_loss - result.measured_loss
    if result.uniform_test is not None:
        numbers |= {"minus_uniform_held_back": result.uniform_test.minus_uniform,
                    "uniform_is_plan": float(result.uniform_test.replaces)}
    if result.evaluation is not None:
        score = result.evaluation.plan
        numbers |= {"nll": score.nll, "nll_stderr": score.stderr, "perplexity": score.perplexity, "kl": score.kl,
                    "top1_agreement": score.top1}
        for row in result.evaluation.rows[1:]:
            numbers[f"reference_nll/{row.name.replace(' ', '_').replace('/', '_')}"] = row.nll
        for other in result.evaluation.others:
            score = other.plan
            numbers |= {f"nll/{other.name}": score.nll, f"nll_stderr/{other.name}": score.stderr,
                        f"perplexity/{other.name}": score.perplexity, f"kl/{other.name}": score.kl,
                        f"top1_agreement/{other.name}": score.top1}
    return numbers


def run_params(config: RunConfig) -> Iterable[tuple[str, Any]]:
    """A configuration as names and values of MLflow parameters, nested ones by dotted names as in impq.toml.

    Patterns of layers are values and not names, because MLflow restricts the characters of names. Values hold no
    passwords.
    """
    for key, value in asdict(config).items():
        if key == "options":
            for role, options in value.items():
                yield from ((f"{key}.{role}.{name}", option) for name, option in options.items())
        elif key == "pins":
            yield key, ", ".join(f"{pattern}={width}" for pattern, width in value.items())
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", ", ".join(item) if isinstance(item, tuple) else item)
                        for name, item in value.items())
        elif isinstance(value, tuple):
            yield key, ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
        else:
            yield key, without_secret(value) if key == "tracking_uri" else value
