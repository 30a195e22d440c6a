"""Progress and results in the terminal."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from impq_core.errors import ImpqError
from impq_core.hookspecs import hookimpl
from impq_core.space import in_bits, unit_of
from impq_core.units import shown
from impq_core.width_map import WidthMap

if TYPE_CHECKING:
    from pathlib import Path

    from impq_core.config import RunConfig
    from impq_core.model.cache import Shelf
    from impq_core.results import Evaluation, RunResult, Score
    from impq_core.runs.allocate import Planned
    from impq_core.runs.fit import Fits
    from impq_core.space import SearchSpace
    from impq_core.types import Plan

PLAIN_SECONDS = 15.0
"""Least time between two plain progress lines, so that logs stay short."""


class ConsoleReporter:
    """Observer that prints progress and results: bars on a terminal, plain lines elsewhere.

    Args:
        console: the console to print on.
        brief: print one line for each finished run, as a sweep does.
    """

    def __init__(self, console: Console, brief: bool = False) -> None:
        self._console, self._brief = console, brief
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._starts: dict[str, tuple[float, int]] = {}  # of a stage: time, and units done then
        self._last = 0.0
        self._printed: tuple[str, int, int] | None = None  # of the last plain line: stage, done, total

    @hookimpl
    def impq_run_started(self, config: RunConfig, space: SearchSpace, folder: Path, coverage: float) -> None:
        """Print the model, the layers, the menu and the budget of the run."""
        if self._brief:
            return
        menu = in_bits(*(choice.name for choice in space.choices))
        share = "" if coverage > 0.99 else f" ({100 * coverage:.0f}% of those in the blocks)"
        self._say(f"{config.model}: {len(space)} layers ({config.granularity}), {space.parameters / 1e6:.1f} M "
                  f"weights{share}, {menu} with {config.backend}"
                  + (f", measured with {config.estimate_with}" if config.estimate_with else "")
                  + f", budget {config.budget}")
        self._say(f"run folder {folder}")

    @hookimpl
    def impq_sweep_started(self, config: RunConfig, folder: Path, varied: Mapping[str, Sequence[str]]) -> None:
        """Print the combinations of the sweep."""
        self._say(f"{config.model}: " + "; ".join(f"{name} {', '.join(values)}" for name, values in varied.items()))
        self._say(f"folder of the runs {folder}")

    @hookimpl
    def impq_progress(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage; without a terminal, print a line every ``PLAIN_SECONDS``."""
        if self._console.is_terminal:
            if self._bars is None:
                self._bars = Progress(TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(),
                                      TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                                      console=self._console)
                self._bars.start()
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
            return
        now = time.monotonic()
        if stage not in self._starts or done < self._starts[stage][1]:
            self._starts[stage] = (now, done)
        ends = total and done in (0, total) and not self._brief and self._printed != (stage, done, total)
        if now - self._last >= PLAIN_SECONDS or ends:
            started, first = self._starts[stage]
            remaining = (now - started) / (done - first) * (total - done) if done > first else math.nan
            tail = "" if math.isnan(remaining) or done == total else f", about {remaining:.0f} s left"
            self._say(f"{stage}: {done} of {total}{tail}")
            self._last, self._printed = now, (stage, done, total)

    @hookimpl
    def impq_plan_ready(self, plan: Plan) -> None:
        """Print the plan's predicted cost and its gap to the proven bound."""
        if self._brief:
            return
        gap = "" if plan.gap is None or plan.predicted_loss is None else f", proven within {plan.gap:.2g}"
        if plan.predicted_loss is not None:
            unit = "nats per token" if plan.is_loss else "without unit (the estimate only ranks)"
            self._say(f"plan by {plan.method}: predicted cost {plan.predicted_loss:.4f} {unit}{gap}")

    @hookimpl
    def impq_run_finished(self, result: RunResult) -> None:
        """Print the summary and the evaluation."""
        if self._brief:
            score = result.evaluation.plan if result.evaluation else None
            self._say(f"{result.folder.name}: {score_line(score)}" if score else result.folder.name)
            if result.uniform_test and result.uniform_test.replaces:
                self._say(result.uniform_test.describe())
            return
        self._stop()
        print_result(result, self._console)

    @hookimpl
    def impq_run_failed(self, error: BaseException) -> None:
        """Remove the bars; in a sweep, which continues, print the error."""
        if self._brief and isinstance(error, ImpqError):
            self._say(f"not made: {error}")
            return
        self._stop()

    @hookimpl
    def impq_sweep_finished(self, folder: Path) -> None:
        """Remove the bars."""
        self._stop()

    def _say(self, text: str) -> None:
        _say(self._console, text)

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def print_result(result: RunResult, console: Console) -> None:
    """Print what a run ends with, and ``impq show`` prints again: the summary, the widths and the held-out table."""
    for line in summary(result):
        _say(console, line)
    if result.plan is not None:
        for line in WidthMap.of(result.plan).lines():
            _say(console, line)
    if result.evaluation is not None:
        console.print(evaluation_table(result.evaluation))


def summary(result: RunResult) -> list[str]:
    """Lines about the plan, the cost of the search, the stages and the held-out text."""
    lines = plan_lines(result) if result.plan else []
    if result.uniform_test:
        lines.append(result.uniform_test.describe())
    if result.measurements is None and result.estimate is not None:
        lines.append(f"search: {result.forwards:.1f} full-model forwards (of {result.config.game_windows} windows of "
                     f"{result.config.calibration.shown} calibration text)")
    if result.measurements is not None:
        measured = result.measurements
        lines.append(f"search: {len(measured)} losses on {measured.tokens} tokens of "
                     f"{result.config.calibration.shown} calibration text, {result.forwards:.1f} full-model forwards")
    if result.estimate is not None and result.estimate.stderr is not None:
        error = result.estimate.stderr[:, 1:].mean()
        spread = result.estimate.linear[:, -1].std()
        shown = "unknown (one replicate)" if math.isnan(error) else f"{error:.4f} on average"
        lines.append(f"estimate {result.estimate.method}: standard error {shown}, "
                     f"spread over layers {spread:.4f} nats per token")
    if result.seconds:  # runs of a sweep share their stages
        lines.append("seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result.seconds.items()))
    if result.evaluation:
        how = ("plan and references quantized in sequence, as an export is" if result.evaluation.sequential
               else "every width quantized behind a prefix at the widest")
        for text in result.evaluation.texts:
            name = f" {text.name}" if text.name else ""
            lines.append(f"held-out text{name}: {text.text}, {text.tokens} scored tokens; {how}")
    return lines


def last_lines(result: RunResult) -> list[str]:
    """The plan, its held-out score and the folder: all that ``--quiet`` prints of a run."""
    scored = [score_line(result.evaluation.plan)] if result.evaluation else []
    fallen = [result.uniform_test.describe()] if result.uniform_test and result.uniform_test.replaces else []
    return [*(plan_lines(result)[:1] if result.plan else []), *fallen, *scored, f"files in {result.folder}"]


def plan_lines(result: RunResult) -> list[str]:
    """Lines about the plan's widths and bytes."""
    plan = result.plan
    assert plan is not None
    alike = f" (this is uniform {plan.space.choices[plan.pick[0]]})" if (plan.pick == plan.pick[0]).all() else ""
    unit = unit_of([choice.name for choice in plan.space.choices])
    return [f"plan: {width_counts(plan)}{unit}{alike}; {plan.nbytes / 1e6:.2f} MB = "
            f"{plan.space.nominal_bits(plan.nbytes):.3f} bits nominal, "
            f"{plan.space.bits_per_weight(plan.nbytes):.3f} stored",
            *_whole_lines(result)]


def _whole_lines(result: RunResult) -> list[str]:
    if result.plan is None or result.model_bytes is None or result.rest_bytes is None:
        return []
    file_bytes = result.plan.file_bytes
    return [f"whole model: {result.model_bytes / 1e6:.2f} MB, of which {result.rest_bytes / 1e6:.2f} MB are "
            "embeddings, head, norms and other parts that are no layers"
            + (f"; its file: at most {file_bytes / 1e6:.6g} MB" if file_bytes else ""),
            *(f"{cost.describe(result.plan.pick)} a token, by meter {cost.meter}" for cost in result.plan.costs)]


def width_counts(plan: Plan) -> str:
    """The number of layers at each width: ``6 at 4, 18 at 3``."""
    return ", ".join(f"{int((plan.pick == k).sum())} at {choice}" for k, choice in enumerate(plan.space.choices))


def score_line(score: Score) -> str:
    """A score as one line."""
    return (f"NLL {score.nll:.4f} ± {score.stderr:.4f}, perplexity {score.perplexity:.4g} ± "
            f"{score.perplexity_stderr:.2g}, KL {score.kl:.4f}, top-1 agreement {100 * score.top1:.1f}%")


def evaluation_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the evaluation table, for the terminal and for Markdown; columns for each text if there are
    several."""
    if evaluation.others:
        return _rows_of_texts(evaluation)
    costs = [f"{name} {'MB' if unit == 'bytes' else unit}" for name, unit in evaluation.costs.items()]
    header = ["allocation", "bits", "stored", "MB", *costs, "NLL", "minus plan", "perplexity", "KL", "top-1"]
    cells = []
    for row in evaluation.rows:
        sizes = ["", "", ""]
        if row.nbytes is not None:
            sizes = [f"{row.bits_nominal:.2f}", f"{row.bits_stored:.3f}", f"{row.nbytes / 1e6:.2f}"]
        sizes += [shown(row.costs[name], unit).split(" ")[0] if name in row.costs else ""
                  for name, unit in evaluation.costs.items()]
        difference = evaluation.against_plan(row)
        minus = ""
        if difference is not None:
            minus = f"{difference[0]:+.3f}" + ("" if math.isnan(difference[1]) else f" ± {difference[1]:.3f}")
        if row.score is None:
            cells.append([row.name, *sizes, f"{row.nll:.3f}", minus, f"{math.exp(row.nll):.4g}", "", ""])
        else:
            score = row.score
            cells.append([row.name, *sizes, f"{score.nll:.3f} ± {score.stderr:.3f}", minus,
                          f"{score.perplexity:.4g} ± {score.perplexity_stderr:.2g}", f"{score.kl:.3f}",
                          f"{100 * score.top1:.1f}%"])
    return header, cells


def _rows_of_texts(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """As ``evaluation_rows`` for several texts: NLL, difference and KL on each."""
    header, *cells = ["allocation", "bits", "MB"], *([row.name, "", ""] for row in evaluation.rows)
    for row, line in zip(evaluation.rows, cells, strict=True):
        if row.nbytes is not None:
            line[1:] = f"{row.bits_nominal:.2f}", f"{row.nbytes / 1e6:.2f}"
    for text in evaluation.texts:
        header += [f"NLL {text.name}", "minus plan", "KL"]
        for row, line in zip(text.rows, cells, strict=True):
            difference = text.against_plan(row)
            line += [_plus_minus(f"{row.nll:.3f}", row.stderr) if row.score else f"{row.nll:.3f}",
                     _plus_minus(f"{difference.mean:+.3f}", difference.stderr) if difference else "",
                     f"{row.score.kl:.3f}" if row.score else ""]
    return header, cells


def _plus_minus(value: str, error: float) -> str:
    return value if math.isnan(error) else f"{value} ± {error:.3f}"


def evaluation_table(evaluation: Evaluation) -> Table:
    """The evaluation of a run as a table."""
    header, cells = evaluation_rows(evaluation)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row, style="bold" if row[0] == "plan" else None)
    return table


def fit_table(fits: Fits) -> Table:
    """The table of ``impq fit``."""
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left", caption_justify="left")
    for name in ("surrogate", "error", "misordered", "explained", "file"):
        table.add_column(name, justify="left" if name in ("surrogate", "file") else "right", overflow="fold")
    for fit in fits.surrogates:
        if fit.validation is None:
            table.add_row(fit.surrogate, "", "", "", fit.problem)
        else:
            validation, is_loss = fit.validation, fit.estimate is None or fit.estimate.is_loss
            table.add_row(fit.surrogate, f"{validation.error:.4f}" if is_loss else "",
                          f"{100 * validation.misordered:.1f}%",
                          f"{100 * validation.explained:.1f}%" if is_loss else "", str(fit.file))
    if math.isnan(fits.game.loss):
        table.title = "share of interactions in the game: unknown, too few measurements"
    else:
        table.title = (f"of the variance among equally many demotions, {100 * fits.game.loss:.1f}% is of order two and "
                       f"above, {100 * fits.game.linked:.1f}% after the best saturating or growing curve")
    table.caption = ("cross-validated over permutations: root mean square error in nats per token; pairs of equally "
                     "many demotions in the wrong order (50% is random); explained variance among equally many "
                     "demotions; empty if the surrogate predicts no loss")
    return table


def plans_table(plans: Sequence[Planned]) -> Table:
    """The table of ``impq allocate``."""
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left", caption_justify="left")
    costs = [f"{cost.name} {'MB' if cost.unit == 'bytes' else cost.unit}" for cost in plans[0].plan.costs]
    for name in ("budget", "bits", "stored", "MB", *costs, "predicted cost", "proven within", "layers", "file"):
        table.add_column(name, justify="left" if name in ("budget", "layers", "file") else "right", no_wrap=True)
    for planned in plans:
        plan, space = planned.plan, planned.plan.space
        table.add_row(planned.budget, f"{space.nominal_bits(plan.nbytes):.3f}",
                      f"{space.bits_per_weight(plan.nbytes):.3f}", f"{plan.nbytes / 1e6:.2f}",
                      *(shown(cost.of(plan.pick), cost.unit).split(" ")[0] for cost in plan.costs),
                      "" if plan.predicted_loss is None else f"{plan.predicted_loss:.4f}",
                      "" if plan.gap is None else f"{plan.gap:.2g}", width_counts(plan), planned.file.name)
    unit = "in nats per token above the widest model" if plans[0].plan.is_loss else "of an estimate that only ranks"
    table.caption = f"files in {plans[0].file.parent}; predicted cost {unit}, not measured"
    return table


def shelves_table(shelves: Sequence[Shelf]) -> Table:
    """The table of ``impq cache``."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("model", "backend", "options", "variants", "scores", "MB", "last used", "folder"):
        table.add_column(name, justify="right" if name in ("variants", "scores", "MB") else "left", overflow="fold")
    for shelf in shelves:
        options = ", ".join(f"{key}={value}" for key, value in shelf.about.get("options", {}).items())
        table.add_row(shelf.model, str(shelf.about.get("backend")).split(".")[0], options,
                      str(shelf.count), str(shelf.facts), f"{shelf.nbytes / 1e6:.1f}",
                      time.strftime("%Y-%m-%d %H:%M", time.localtime(shelf.used)), str(shelf.folder))
    return table


def make_console() -> Console:
    """Standard output, 130 columns wide if it is not a terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 130)


def quiet_libraries() -> None:
    """Silence banners and bars of other libraries; their errors are still printed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
