"""The page of a comparison: a single HTML file that loads nothing else."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from impq_core.compare.contest import Contest, Contestant
from impq_core.compare.drawing import Picture
from impq_core.compare.figures import Section, draw_details, draw_glance
from impq_core.compare.layers import WidthStrips, width_strips
from impq_core.compare.outcomes import Prompt, TasksTable, prompts_of, task_tables
from impq_core.compare.rows import PlanTable, plan_table
from impq_core.compare.table import model_name
from impq_core.compare.verdict import Verdict, give_verdict
from impq_core.errors import ImpqError
from impq_core.files import write_text


@dataclass(frozen=True)
class Fact:
    """Line of the provenance table: a value, and the runs that have it (none named: all runs)."""

    name: str
    value: str
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chapter:
    """A contest: its verdict, figures, tables and provenance, in the order of the page."""

    model: str
    contest: Contest
    verdict: Verdict
    glance: Sequence[Picture]
    table: PlanTable
    tasks: Sequence[TasksTable]
    prompts: Sequence[Prompt]
    widths: Sequence[WidthStrips]
    details: Sequence[Section]
    facts: Sequence[Fact]


def write_page(contests: Sequence[Contest], path: Path) -> None:
    """Write the page, whole or not at all; raises ImpqError if it cannot be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ImpqError(f"{path} cannot be written: give --html a file in an existing folder")
    page = render(contests)
    try:
        write_text(path, page)
    except OSError as error:
        raise ImpqError(f"{path} cannot be written: {error.strerror}") from error


def render(contests: Sequence[Contest]) -> str:
    """The page as HTML. All names are escaped, figures are embedded, and nothing is loaded from a server."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    chapters = list(_chapters(contests))
    files = resources.files("impq_core.compare")
    template, style = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.html.jinja", "page.css"))
    return environment.from_string(template).render(
        chapters=chapters, style=style, version=importlib.metadata.version("impq"),
        date=f"{datetime.now():%Y-%m-%d %H:%M}")


def _chapters(contests: Sequence[Contest]) -> Iterator[Chapter]:
    """The chapters; what does not depend on the held-out text is in the first one of the same runs."""
    seen: set[Path] = set()
    for contest in contests:
        folders = {run.folder for run in contest.contestants}
        new, seen = not folders <= seen, seen | folders
        yield Chapter(model_name(contest), contest, give_verdict(contest), draw_glance(contest), plan_table(contest),
                      task_tables(contest) if new else (), prompts_of(contest) if new else (),
                      tuple(width_strips(contest)) if new else (), draw_details(contest) if new else (),
                      tuple(facts(contest)))


def facts(contest: Contest) -> Iterator[Fact]:
    """Provenance of the runs: configuration, seeds, texts, digests, versions."""
    recorded = {f"{contest.budget_of(run)}: {contest.label(run)}": _recorded(run) for run in contest.contestants}
    for key in dict.fromkeys(key for data in recorded.values() for key in data):
        values: dict[str, list[str]] = {}
        for name, data in recorded.items():
            values.setdefault(data.get(key, "not recorded"), []).append(name)
        for value, names in values.items():
            yield Fact(key, value, () if len(values) == 1 else tuple(names))


def _recorded(run: Contestant) -> dict[str, str]:
    c = run.config
    seeds = {"run": c.seed, "calibration": c.calibration.seed, "evaluation": c.evaluation.seed}
    chosen = {"model": c.model, "dtype": c.dtype, "held-out text": run.evaluation.text,
              "scored tokens": run.evaluation.tokens, "quantized in sequence": run.evaluation.sequential,
              "calibration text": c.calibration.shown, "seed": seeds,
              "budget in bytes": run.budget_bytes, "run folder": str(run.folder)}
    return dict([*_flat(chosen), *_flat(run.provenance, "recorded")])


def _flat(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        name = f"{above} {key}" if above else str(key)
        if isinstance(value, dict) and value:
            yield from _flat(value, name)
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
