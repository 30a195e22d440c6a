"""The scores of tasks in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table

from impq_core.task_scores import UNQUANTIZED, TaskScore, TaskTable


def task_tables(table: TaskTable) -> Iterator[Table]:
    """A table for each task, with a line for each model and columns for each metric."""
    for task in dict.fromkeys(score.task for score in table.scores):
        scores = [score for score in table.scores if score.task == task]
        metrics = list(dict.fromkeys((score.metric, score.filter) for score in scores))
        rows = dict.fromkeys(score.row for score in scores)
        against = UNQUANTIZED in rows and len(rows) > 1
        made = Table(box=None, header_style="bold", pad_edge=False, title_justify="left", title=_title(scores[0]))
        made.add_column("model", no_wrap=True)
        made.add_column("MB", justify="right")
        for metric, kind in metrics:
            better = {score.higher_is_better for score in scores if (score.metric, score.filter) == (metric, kind)}
            made.add_column(metric + ("" if kind == "none" else f" ({kind})") + _arrow(better), justify="right")
            if against:
                made.add_column("minus unquantized", justify="right")
        for row in rows:
            own = {(score.metric, score.filter): score for score in scores if score.row == row}
            size = next(iter(own.values())).bytes
            cells = [row, "" if size is None else f"{size / 1e6:.2f}"]
            for place in metrics:
                score = own.get(place)
                cells.append("" if score is None else _number(score.value, score.stderr))
                if against:
                    difference = table.against_unquantized(score) if score else None
                    cells.append("" if difference is None else _number(difference.mean, difference.stderr, "+"))
            made.add_row(*cells)
        yield made


def _title(score: TaskScore) -> str:
    shots = f", {score.fewshot} examples in the prompt" if score.fewshot else ""
    chat = ", in the chat template" if score.chat else ""
    return f"{score.task}: {score.n} documents{shots}{chat} (lm-eval {score.lm_eval})"


def _arrow(better: set[bool | None]) -> str:
    return {True: " ↑", False: " ↓", None: ""}[next(iter(better))] if len(better) == 1 else ""


def _number(value: float, stderr: float, sign: str = "") -> str:
    """Four digits behind the point, as lm-eval prints them."""
    return f"{value:{sign}.4f}" + ("" if math.isnan(stderr) else f" ± {stderr:.4f}")
