"""What runs did on tasks and prompts, for the page: tables of the tasks of lm-eval, answers side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from impq_core.compare.contest import Contest, Contestant
from impq_core.compare.rows import Cell, megabytes
from impq_core.paired_answers import Answer, Split
from impq_core.task_scores import UNQUANTIZED, TaskScore
from impq_core.window_losses import Difference


@dataclass(frozen=True)
class TasksTable:
    """Scores of tasks that were measured alike: as many documents, in the same way.

    Args:
        title: how they were measured.
        header: names of the columns.
        lines: cells of the unquantized model, of the plan of each run, then of uniform models and mixes.
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Reply:
    """The answer of a model to a prompt.

    Args:
        model: the model's name.
        common: what both answers begin with.
        token: the first token that differs; empty if none does, or if there are several answers to differ from.
        rest: what follows.
        caption: where the answers differ, and by how much.
    """

    model: str
    common: str
    token: str
    rest: str
    caption: str


@dataclass(frozen=True)
class Prompt:
    """A prompt with the answers of all models, the unquantized model's first."""

    text: str
    replies: tuple[Reply, ...]


def task_tables(contest: Contest) -> tuple[TasksTable, ...]:
    """The scores of a contest's runs on tasks: a table for each way of asking, a column for each metric."""
    lines: dict[_Way, dict[tuple[str, int | None], dict[str, Cell]]] = {}
    kinds: dict[_Way, list[TaskScore]] = {}
    for run, score, difference in _scores(contest):
        way = _Way.of(score)
        model = contest.name(run) if score.row == PLAN else score.row
        cells = lines.setdefault(way, {}).setdefault((model, score.bytes), {})
        cells.setdefault(score.name, Cell(_value(score), note=_difference(difference)))
        kinds.setdefault(way, []).append(score)
    return tuple(_table(way, kinds[way], models) for way, models in lines.items())


def prompts_of(contest: Contest) -> tuple[Prompt, ...]:
    """The answers of a contest's runs, by prompt."""
    found: dict[tuple[str, bool, int], list[tuple[Contestant, Answer]]] = {}
    for run in contest.ordered:
        for answer in run.answers.answers:
            found.setdefault((_prompt(answer), answer.chat, answer.limit), []).append((run, answer))
    return tuple(Prompt(text, tuple(_replies(contest, asked))) for (text, _, _), asked in found.items())


PLAN = "plan"


class _Way(NamedTuple):
    """How tasks were asked; scores of different ways are not put into one table."""

    limit: int | None
    fewshot: int
    chat: bool
    lm_eval: str

    @classmethod
    def of(cls, score: TaskScore) -> _Way:
        return cls(score.limit, score.fewshot, score.chat, score.lm_eval)


def _scores(contest: Contest) -> Iterator[tuple[Contestant, TaskScore, Difference | None]]:
    """The scores of the unquantized model, then those of plans, then those of other models, the largest first."""
    order = {UNQUANTIZED: 0, PLAN: 1}
    found = [(run, score) for run in contest.ordered for score in run.tasks.scores]
    places = {run.folder: (run.plan.nbytes or 0, place) for place, run in enumerate(contest.ordered)}

    def key(item: tuple[Contestant, TaskScore]) -> tuple[int, tuple[int, int]]:
        run, score = item
        kind = order.get(score.row, 2)
        return kind, places[run.folder] if kind < 2 else (-(score.bytes or 0), 0)

    for run, score in sorted(found, key=key):
        yield run, score, run.tasks.against_unquantized(score)


def _table(way: _Way, scores: Sequence[TaskScore],
           models: Mapping[tuple[str, int | None], Mapping[str, Cell]]) -> TasksTable:
    columns = {score.name: score for score in scores}
    arrows = {True: " ↑", False: " ↓", None: ""}
    header = ("model", "MB", *(name + arrows[score.higher_is_better] for name, score in columns.items()))
    lines = tuple((Cell(model), Cell(megabytes(nbytes)), *(cells.get(name, Cell("")) for name in columns))
                  for (model, nbytes), cells in models.items())
    counts = sorted({score.n for score in scores})
    documents = f"{counts[0]} documents" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} documents a task"
    limit = "" if way.limit is None else f" (at most {way.limit} asked for)"
    shots = f", {way.fewshot} examples in the prompt" if way.fewshot else ""
    chat = ", in the chat template" if way.chat else ""
    return TasksTable(f"{documents}{limit}{shots}{chat}; lm-eval {way.lm_eval}", header, lines)


def _replies(contest: Contest, asked: Sequence[tuple[Contestant, Answer]]) -> Iterator[Reply]:
    first, alone = asked[0][1], len(asked) == 1
    split = first.split if alone else None
    yield _reply(UNQUANTIZED, first.unquantized, split, split.unquantized if split else "", "")
    for run, answer in asked:
        if (split := answer.split) is None:
            yield Reply(contest.name(run), answer.plan, "", "", f"the same {answer.plan_tokens} tokens")
            continue
        kl = "" if math.isnan(split.kl) else f"; KL there {split.kl:.3f} nats"
        yield _reply(contest.name(run), answer.plan, split, split.plan,
                     f"tokens in common: {split.token}; then {split.plan!r} in place of {split.unquantized!r}{kl}")


def _reply(model: str, text: str, split: Split | None, token: str, caption: str) -> Reply:
    common = split.common if split and text.startswith(split.common) else ""
    marked = token if split and text.startswith(common + token) else ""
    return Reply(model, common, marked, text[len(common + marked):], caption)


def _prompt(answer: Answer) -> str:
    if not answer.messages:
        return answer.prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in answer.messages)


def _value(score: TaskScore) -> str:
    return f"{score.value:.3f}" + ("" if math.isnan(score.stderr) else f" ± {score.stderr:.3f}")


def _difference(gap: Difference | None) -> str:
    return "" if gap is None else f"{gap.mean:+.3f}" + ("" if math.isnan(gap.stderr) else f" ± {gap.stderr:.3f}")
