"""Results of runs, exports and held-out evaluations, as plain data.

Nothing here needs torch: observers, comparisons and the command line read results without the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from impq_core.config import RunConfig
from impq_core.displayed import Displayed
from impq_core.errors import ImpqError
from impq_core.files import write_text
from impq_core.space import FloatArray, IntArray
from impq_core.statistics import standard_error
from impq_core.types import Measurements, Plan, SensitivityEstimate
from impq_core.uniform_test import UniformTest
from impq_core.window_losses import Difference, WindowLosses


@dataclass(frozen=True, eq=False)
class Score(WindowLosses):
    """Held-out quality of one allocation.

    Args:
        window_nll: float64 (windows,), mean nats per token of each window.
        kl: mean KL divergence from the unquantized model's next-token distribution, nats per token.
        top1: share of tokens for which the most likely successor is the same as the unquantized model's.
        window_tokens: int64 (windows,), scored tokens of each window; None if all windows have the same.
        window_kl: float64 (windows,), KL divergence of each window; None in files of earlier versions.
    """

    window_nll: FloatArray
    kl: float
    top1: float
    window_tokens: IntArray | None = None
    window_kl: FloatArray | None = None

    @property
    def divergence(self) -> Difference:
        """``kl`` and its standard error over windows (NaN if unknown)."""
        return Difference(self.kl, math.nan if self.window_kl is None else standard_error(self.window_kl,
                                                                                          self.window_tokens))

    @property
    def perplexity(self) -> float:
        """exp of ``nll``."""
        return math.exp(min(self.nll, 700.0))

    @property
    def perplexity_stderr(self) -> float:
        """Standard error of ``perplexity`` by the delta method: perplexity times the standard error of the NLL."""
        return self.perplexity * self.stderr

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        windows = {} if self.window_kl is None else {"window_kl": self.window_kl.tolist()}
        return {"window_nll": self.window_nll.tolist(), "kl": self.kl, "top1": self.top1, **_tokens_of(self), **windows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """Read the data of ``to_dict``; raises KeyError, TypeError or ValueError if it is something else."""
        windows = data.get("window_kl")
        return cls(np.array(data["window_nll"], float), float(data["kl"]), float(data["top1"]),
                   _read_tokens(data), None if windows is None else np.array(windows, float))


@dataclass(frozen=True, eq=False)
class Row(WindowLosses):
    """Line of an evaluation: an allocation, its size and its loss.

    Args:
        name: ``plan``, ``estimated plan``, ``unquantized``, ``uniform 3``, ``mix Q4_K_M``, ``first/last high``,
            ``random 1``, ``line low-high`` ...
        window_nll: float64 (windows,), mean nats per token of each window.
        nbytes: stored bytes of the quantizable weights; None for the unquantized model.
        bits_nominal: nominal average width, bits per weight; None for the unquantized model.
        bits_stored: stored bits per weight; None for the unquantized model.
        score: the measured score; None if the losses are interpolated between uniform models.
        window_tokens: int64 (windows,), scored tokens of each window; None if all windows have the same.
        costs: what meters give it beside bytes, by name of the cost, in the units of ``Evaluation.costs``.
    """

    name: str
    window_nll: FloatArray
    nbytes: int | None = None
    bits_nominal: float | None = None
    bits_stored: float | None = None
    score: Score | None = None
    window_tokens: IntArray | None = None
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """First word of the name: plan, estimated, unquantized, uniform, mix, line, first/last or random."""
        return self.name.partition(" ")[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with derived numbers for other programs."""
        data: dict[str, Any] = {"name": self.name, "bytes": self.nbytes, "nll": self.nll}
        if self.nbytes is not None:
            data |= {"bits_nominal": self.bits_nominal, "bits_stored": self.bits_stored}
        if self.score is not None:
            data |= {"nll_stderr": self.stderr, "perplexity": self.score.perplexity,
                     "perplexity_stderr": self.score.perplexity_stderr, "kl": self.score.kl,
                     "top1_agreement": self.score.top1, "window_nll": self.window_nll.tolist(), **_tokens_of(self)}
            if self.score.window_kl is not None:
                data |= {"kl_stderr": self.score.divergence.stderr, "window_kl": self.score.window_kl.tolist()}
        return {**data, "costs": dict(self.costs)} if self.costs else data


@dataclass(frozen=True, eq=False)
class Evaluation(Displayed):
    """The plan and its references on one held-out text, and the same on others.

    Args:
        rows: the plan first; among the others, one named ``unquantized``.
        text: description of the held-out text.
        tokens: scored tokens.
        sequential: whether plan and references were quantized in sequence, as an export is; else every width is
            quantized behind a prefix at the widest.
        name: of the text among several; empty if there is one.
        others: the same allocations on further texts; empty in these.
        costs: unit of each cost of the rows, by its name.

    Raises:
        ImpqError: the first row is no measured plan, no row is the unquantized model, or rows have different numbers of
            windows.
    """

    rows: tuple[Row, ...]
    text: str
    tokens: int
    sequential: bool = False
    name: str = ""
    others: tuple[Evaluation, ...] = ()
    costs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        measured = {row.name for row in self.rows if row.score is not None}
        if not self.rows or self.rows[0].nbytes is None or not {self.rows[0].name, "unquantized"} <= measured:
            raise ImpqError("an evaluation needs a measured plan with its bytes in its first row, and a row for the "
                            "unquantized model")
        if len({len(row.window_nll) for row in self.rows}) != 1 or not len(self.rows[0].window_nll):
            raise ImpqError("rows of an evaluation have different numbers of windows, or none")
        if any([row.name for row in other.rows] != [row.name for row in self.rows] for other in self.others):
            raise ImpqError("the texts of an evaluation have different rows")

    @property
    def texts(self) -> tuple[Evaluation, ...]:
        """The evaluation on each text, the first included, each with one text."""
        return (replace(self, others=()), *self.others)

    def row(self, name: str) -> Row:
        """The row of that name; raises KeyError if there is none."""
        return {row.name: row for row in self.rows}[name]

    @property
    def plan(self) -> Score:
        """The plan's score."""
        score = self.rows[0].score
        assert score is not None
        return score

    @property
    def plan_is(self) -> str:
        """The name of the uniform model that the plan is, such as ``uniform 3``; empty if it is none."""
        plan = self.rows[0]
        return next((row.name for row in self.rows if row.kind == "uniform" and row.nbytes == plan.nbytes
                     and np.array_equal(row.window_nll, plan.window_nll)), "")

    def against_plan(self, row: Row) -> Difference | None:
        """A row's NLL minus the plan's, paired over windows; None for the plan itself."""
        return None if row is self.rows[0] else row.minus(self.rows[0])

    def with_lines(self) -> Evaluation:
        """The evaluation with rows for straight lines between its uniform models at the plan's bytes: ``line
        low-high`` between the smallest and the largest, ``line of uniforms`` between neighbours if there are more
        than two. Losses are interpolated window by window."""
        points = sorted(((row.nbytes, row.nll, row.window_nll) for row in self.rows
                         if row.kind == "uniform" and row.nbytes is not None), key=lambda point: point[:2])
        lines = {"line low-high": [points[0], points[-1]]} if points else {}
        if len(points) > 2:
            lines["line of uniforms"] = points
        plan, rows = self.rows[0], list(self.rows)
        assert plan.nbytes is not None
        for name, ends in lines.items():
            sizes, _, windows = zip(*ends, strict=True)
            between = np.array([np.interp(plan.nbytes, sizes, losses) for losses in np.stack(windows, axis=1)])
            rows.append(Row(name, between, plan.nbytes, plan.bits_nominal, plan.bits_stored,
                            window_tokens=plan.window_tokens))
        return replace(self, rows=tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a number that is not finite is null, except in those of windows."""
        rows = []
        for row in self.rows:
            data = row.to_dict()
            if (difference := self.against_plan(row)) is not None:
                data |= {"minus_plan": difference.mean, "minus_plan_stderr": difference.stderr}
            rows.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()})
        costs = {"costs": dict(self.costs)} if self.costs else {}
        data = {"text": self.text, "tokens": self.tokens, "sequential": self.sequential, **costs, "rows": rows}
        name = {"name": self.name} if self.name else {}
        return {**name, **data, **({"others": [other.to_dict() for other in self.others]} if self.others else {})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Read the data of ``to_dict``. Interpolated rows hold no windows there and are computed again.

        Raises:
            ImpqError: it is something else; the message says in which row, and what is wrong.
        """
        for key, kind in (("text", str), ("tokens", int), ("rows", list)):
            if type(data.get(key)) is not kind:
                raise ImpqError(f"an evaluation needs '{key}' as {_KINDS[kind]}, not {data.get(key)!r}"[:200])
        entries = data["rows"]
        if not all(isinstance(entry, Mapping) and isinstance(entry.get("name"), str) for entry in entries):
            raise ImpqError("every row of an evaluation is an object with a name")
        measured = tuple(_measured_row(entry) for entry in entries if "window_nll" in entry)
        name, others = data.get("name", ""), data.get("others", [])
        if not isinstance(name, str) or not isinstance(others, list) or not all(
                isinstance(other, Mapping) and not other.get("others") for other in others):
            raise ImpqError("an evaluation has its 'name' as text, and 'others' as a list of evaluations")
        units = data.get("costs", {})
        if not isinstance(units, Mapping) or not all(isinstance(unit, str) for unit in units.values()):
            raise ImpqError("'costs' of an evaluation is an object with a unit for each cost")
        evaluation = cls(measured, data["text"], data["tokens"], data.get("sequential") is True, name,
                         costs=units).with_lines()
        evaluation = replace(evaluation, others=tuple(map(cls.from_dict, others)))
        if names := {entry["name"] for entry in entries} - {row.name for row in evaluation.rows}:
            raise ImpqError(f"row '{min(names)}' of an evaluation has no 'window_nll'")
        return evaluation

    def save(self, path: Path) -> None:
        """Write evaluation.json, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


_KINDS = {str: "text", int: "a whole number", list: "a list"}


def _measured_row(entry: Mapping[str, Any]) -> Row:
    name, nbytes = entry["name"], entry.get("bytes")
    if nbytes is not None and (type(nbytes) is not int or nbytes < 0):
        raise ImpqError(f"row '{name}' of an evaluation: 'bytes' is a whole number or null, not {nbytes!r}"[:200])
    for key in ("window_nll", "window_kl"):
        windows = entry.get(key, [0.0])
        if not isinstance(windows, Sequence) or not windows or not all(type(one) in (int, float) for one in windows):
            raise ImpqError(f"row '{name}' of an evaluation: '{key}' is no list of numbers")
    window_nll = np.array(entry["window_nll"], dtype=np.float64)
    window_kl = np.array(entry["window_kl"], dtype=np.float64) if "window_kl" in entry else None
    try:
        tokens = _read_tokens(entry)
    except (TypeError, ValueError) as error:
        raise ImpqError(f"row '{name}' of an evaluation: 'window_tokens' is no list of whole numbers") from error
    costs = entry.get("costs", {})
    if not isinstance(costs, Mapping) or not all(type(cost) in (int, float) for cost in costs.values()):
        raise ImpqError(f"row '{name}' of an evaluation: 'costs' is an object of numbers, not {costs!r}"[:200])
    score = Score(window_nll, _number(entry, "kl"), _number(entry, "top1_agreement"), tokens, window_kl)
    if nbytes is None:
        return Row(name, window_nll, score=score, window_tokens=tokens, costs=costs)
    return Row(name, window_nll, nbytes, _number(entry, "bits_nominal"), _number(entry, "bits_stored"), score, tokens,
               costs)


def _tokens_of(losses: WindowLosses) -> dict[str, list[int]]:
    return {} if losses.window_tokens is None else {"window_tokens": losses.window_tokens.tolist()}


def _read_tokens(data: Mapping[str, Any]) -> IntArray | None:
    """The scored tokens of each window, if the data have them; raises TypeError or ValueError if they are none."""
    if "window_tokens" not in data:
        return None
    tokens = np.array(data["window_tokens"], np.int64)
    if tokens.shape != (len(data["window_nll"]),) or not (tokens > 0).all():
        raise ValueError("a window has no scored token, or there is another number of windows")
    return tokens


def _number(entry: Mapping[str, Any], key: str) -> float:
    """A number of a row, NaN for null."""
    if key not in entry or type(entry[key]) not in (int, float, type(None)):
        raise ImpqError(f"row '{entry['name']}' of an evaluation needs '{key}' as a number or null, not "
                        f"{entry.get(key)!r}"[:200])
    return math.nan if entry[key] is None else float(entry[key])


@dataclass(frozen=True, eq=False)
class RunResult(Displayed):
    """Results of a run; the same are files in ``folder``. If only an estimate was asked for, there is no plan and no
    evaluation.

    Args:
        folder: the run folder.
        config: the configuration.
        plan: the plan.
        evaluation: the plan and its references on held-out text.
        estimate: the estimate that the plan was made from; None if the plan was given.
        measurements: losses that the estimate was fitted to; None if the estimator measured none.
        measured_loss: the plan's loss in the game it was estimated from, nats per token above the reference, to compare
            with ``plan.predicted_loss``; None if no calibration text was read, or if a uniform model is the plan.
        forwards: cost of the search in full-model forwards.
        rest_bytes: bytes of all that is in no layer (norms; embeddings and head unless they are layers); None if the
            result was read from a folder that does not say.
        seconds: by stage.
        digests: of the tokens of the texts: by ``calibration``, ``evaluation``, and ``evaluation NAME`` for further
            held-out texts.
        uniform_test: the estimated plan against the uniform model of its budget; None if it was not tested.
    """

    folder: Path
    config: RunConfig
    plan: Plan | None
    evaluation: Evaluation | None
    estimate: SensitivityEstimate | None
    measurements: Measurements | None
    measured_loss: float | None
    forwards: float
    rest_bytes: int | None
    seconds: dict[str, float]
    digests: dict[str, str]
    uniform_test: UniformTest | None = None

    @property
    def state(self) -> Literal["finished", "planned", "estimated"]:
        """How far the run went: to the held-out scores, to a plan, or to an estimate."""
        return "finished" if self.evaluation else "planned" if self.plan else "estimated"

    @property
    def model_bytes(self) -> int | None:
        """Bytes of the whole model under the plan; None if they are unknown."""
        return None if self.plan is None or self.rest_bytes is None else self.plan.nbytes + self.rest_bytes


@dataclass(frozen=True)
class Exported:
    """An exported folder.

    Args:
        folder: the folder.
        format: name of the exporter.
        score: held-out score of the model in it; None for a recipe, which holds no model.
        text: description of the held-out text.
        nbytes: stored bytes of the quantized weights.
        file_bytes: bytes of the model's file, embeddings and head included; 0 for a recipe.
        others: scores on further held-out texts, by name.
    """

    folder: Path
    format: str
    score: Score | None
    text: str
    nbytes: int
    file_bytes: int
    others: Mapping[str, Score] = field(default_factory=dict)
