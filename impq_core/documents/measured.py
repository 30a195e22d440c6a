"""Documents of curves, tasks and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from impq_core.curve import Curve, Outcome, Point
from impq_core.documents.base import Document
from impq_core.paired_answers import Answer, AnswerTable
from impq_core.results import Row
from impq_core.task_scores import TaskScore, TaskTable


@dataclass(frozen=True)
class SizeDocument:
    """A model of a curve: a plan, or a uniform model.

    Args:
        allocation: the plan's budget as it was given, or the name of the uniform model.
        run: folder of the plan's run; null for a uniform model.
        size_bytes: stored bytes of the quantizable weights.
        bits_nominal, bits_stored: nominal and stored bits a weight.
        nll_nats: held-out loss.
        excess_nats, excess_stderr_nats: its loss minus the unquantized model's, and the standard error of that, paired
            over windows.
        kl_nats, kl_stderr_nats: divergence from the unquantized model, and its standard error over windows.
        minus_line_nats, minus_line_stderr_nats: its loss minus that on the line between uniform models at its bytes,
            and the standard error of that, paired over windows; null for a uniform model.
    """

    allocation: str
    run: str | None
    size_bytes: int | None
    bits_nominal: float | None
    bits_stored: float | None
    nll_nats: float | None
    excess_nats: float | None
    excess_stderr_nats: float | None
    kl_nats: float | None
    kl_stderr_nats: float | None
    minus_line_nats: float | None
    minus_line_stderr_nats: float | None

    @classmethod
    def of(cls, row: Row, unquantized: Row, point: Point | None = None) -> SizeDocument:
        """The document of a measured row, which is a plan's if there is a point."""
        assert row.score is not None
        excess, divergence, minus = row.minus(unquantized), row.score.divergence, point.minus_line if point else None
        return cls(point.budget if point else row.name, str(point.run) if point else None, row.nbytes,
                   row.bits_nominal, row.bits_stored, row.nll, excess.mean, excess.stderr, divergence.mean,
                   divergence.stderr, minus.mean if minus else None, minus.stderr if minus else None)


@dataclass(frozen=True)
class CurveDocument:
    """Plans for several budgets from one estimate.

    Args:
        parts: names of the parts that made it, by slot.
        plans: the smallest first.
        uniform: uniform models, the smallest first.
        knee_run: folder of the run at the knee; null if there is none.
        knee_depth_nats, knee_depth_stderr_nats: how far its loss lies below the straight line between the smallest and
            the largest plan, and the standard error of that, paired over windows; null without a knee.
    """

    parts: dict[str, str]
    plans: list[SizeDocument]
    uniform: list[SizeDocument]
    knee_run: str | None
    knee_depth_nats: float | None
    knee_depth_stderr_nats: float | None

    @classmethod
    def of(cls, curve: Curve) -> CurveDocument:
        """The document of a curve."""
        knee = curve.knee
        return cls(dict(curve.parts), [SizeDocument.of(point.row, curve.unquantized, point) for point in curve.points],
                   [SizeDocument.of(row, curve.unquantized) for row in curve.uniform],
                   str(knee.point.run) if knee else None, knee.depth.mean if knee else None,
                   knee.depth.stderr if knee else None)


@dataclass(frozen=True)
class TargetDocument:
    """The smallest measured plan within a target.

    Args:
        target: as it was given.
        within_run: folder of that plan's run; null if every plan misses the target.
        within_confidence: probability that the plan is within the target on all text like the held-out one.
        outside_run: folder of the run with the next smaller budget, which misses the target; null if there is none.
        uniform_within: the smallest uniform model within the target that is smaller than that plan; null if there is
            none.
    """

    target: str
    within_run: str | None
    within_confidence: float | None
    outside_run: str | None
    uniform_within: str | None

    @classmethod
    def of(cls, outcome: Outcome) -> TargetDocument:
        """The document of the outcome of a search."""
        within, outside, uniform = outcome.within, outcome.outside, outcome.uniform_within
        return cls(str(outcome.target), str(within.run) if within else None,
                   outcome.confidence(within) if within else None, str(outside.run) if outside else None,
                   uniform.name if uniform else None)


@dataclass(frozen=True)
class CurvesDocument(Document):
    """Loss against size of a run or a sweep.

    Args:
        folder: of the run or the sweep; it has ``curve.json`` and ``curve.png``.
        text: description of the held-out text.
        tokens: scored tokens.
        sequential: whether plans and references were quantized in sequence, as an export is.
        unquantized_nll_nats: loss of the unquantized model.
        curves: one for each combination of parts.
        target: null without ``--target``.
    """

    kind = "curves"

    folder: str
    text: str
    tokens: int
    sequential: bool
    unquantized_nll_nats: float | None
    curves: list[CurveDocument]
    target: TargetDocument | None

    @classmethod
    def of(cls, folder: Path, curves: Sequence[Curve], outcome: Outcome | None) -> CurvesDocument:
        """The document of the curves of a folder."""
        first = curves[0]
        return cls(str(folder), first.text, first.tokens, first.sequential, first.unquantized.nll,
                   list(map(CurveDocument.of, curves)), TargetDocument.of(outcome) if outcome else None)


@dataclass(frozen=True)
class TaskScoreDocument:
    """The value of one metric of a task for one model.

    Args:
        allocation: the model, as the run's table names it.
        size_bytes: stored bytes of its quantizable weights; null for the unquantized model.
        task: name of the task, or of a group of tasks.
        metric: as lm-eval calls it.
        filter: what lm-eval does with the answers in front of the metric; ``none`` for nothing.
        value: as lm-eval reports it.
        value_stderr: its standard error, as lm-eval reports it; null if it reports none.
        minus_unquantized, minus_unquantized_stderr: the value minus that of the unquantized model, and the standard
            error of that, paired over documents; null for the unquantized model, and if it was not measured alike.
        documents: number of documents.
        limit: the most documents that were asked for; null for all.
        fewshot: number of examples in each prompt.
        chat: whether prompts went through the model's chat template.
        lm_eval: version of lm-eval.
    """

    allocation: str
    size_bytes: int | None
    task: str
    metric: str
    filter: str
    value: float | None
    value_stderr: float | None
    minus_unquantized: float | None
    minus_unquantized_stderr: float | None
    documents: int
    limit: int | None
    fewshot: int
    chat: bool
    lm_eval: str

    @classmethod
    def of(cls, score: TaskScore, table: TaskTable) -> TaskScoreDocument:
        """The document of a score of a table."""
        minus = table.against_unquantized(score)
        return cls(score.row, score.bytes, score.task, score.metric, score.filter, score.value, score.stderr,
                   minus.mean if minus else None, minus.stderr if minus else None, score.n, score.limit, score.fewshot,
                   score.chat, score.lm_eval)


@dataclass(frozen=True)
class TasksDocument(Document):
    """Scores of models on tasks.

    Args:
        folder: of the run or the export; it has ``tasks.json``.
        scores: those of earlier commands included.
    """

    kind = "tasks"

    folder: str
    scores: list[TaskScoreDocument]

    @classmethod
    def of(cls, folder: Path, table: TaskTable) -> TasksDocument:
        """The document of the scores of a folder."""
        return cls(str(folder), [TaskScoreDocument.of(score, table) for score in table.scores])


@dataclass(frozen=True)
class AnswerDocument:
    """The answers of two models to a prompt.

    Args:
        prompt: the prompt; empty if there are messages.
        messages: role and content of each message in front of the answer.
        chat: whether the prompt went through the model's chat template.
        limit_tokens: the most tokens of an answer.
        unquantized: the unquantized model's answer.
        plan: the quantized model's answer.
        differ_at_token: number of tokens that are the same in front of the first difference; null if there is none.
        kl_nats: divergence of the quantized model's distribution of that token from the unquantized model's.
    """

    prompt: str
    messages: list[dict[str, str]]
    chat: bool
    limit_tokens: int
    unquantized: str
    plan: str
    differ_at_token: int | None
    kl_nats: float | None

    @classmethod
    def of(cls, answer: Answer) -> AnswerDocument:
        """The document of a pair of answers."""
        return cls(answer.prompt, [dict(message) for message in answer.messages], answer.chat, answer.limit,
                   answer.unquantized, answer.plan, answer.split.token if answer.split else None,
                   answer.split.kl if answer.split else None)


@dataclass(frozen=True)
class AnswersDocument(Document):
    """Answers of the unquantized and the quantized model.

    Args:
        folder: of the run or the export; it has ``answers.json``.
        answers: to the prompts of this command.
    """

    kind = "answers"

    folder: str
    answers: list[AnswerDocument]

    @classmethod
    def of(cls, folder: Path, table: AnswerTable) -> AnswersDocument:
        """The document of answers of a folder."""
        return cls(str(folder), list(map(AnswerDocument.of, table.answers)))
