"""Several budgets: ``impq curve``, and ``impq run`` with a list of budgets or a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from impq_core.commands.common import (
    check,
    look_at,
    plugin_option,
    read_config,
    read_pairs,
    refuse_others,
    show_forecast,
    trust_option,
    warn,
    watched,
    workers_options,
)
from impq_core.commands.exporting import export_plan, load_exporters
from impq_core.commands.output import Answer, answers
from impq_core.config import override
from impq_core.errors import UsageError
from impq_core.hookspecs import hookimpl
from impq_core.plugins import Plugins
from impq_core.target import MOST_STEPS, STEPS
from impq_core.trust import Trust

if TYPE_CHECKING:
    from impq_core.curve import Curve, Outcome
    from impq_core.runs.folder import RunFolder
    from impq_core.runs.grid import Sweep


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--target`` and ``--steps``."""
    command = click.option("--steps", type=click.IntRange(0, MOST_STEPS), default=STEPS, show_default=True,
                           help="With --target: number of bisections.")(command)
    return click.option("--target", default="", metavar="LOSS",
                        help="Search the smallest plan whose measured loss is within nll+0.1 (above the unquantized "
                             "model) or kl=0.2, instead of taking a budget.")(command)


@click.command()
@click.argument("run")
@click.option("--budget", "budgets", metavar="BUDGETS",
              help="Further budgets to measure, separated by commas: 2.5bits,3.25bpw,60MB.")
@target_options
@click.option("--memory", default="", help="Memory that this may take where blocks compute, such as 8GB [the run's].")
@workers_options("the run's", "the run's")
@trust_option
@plugin_option
@answers
def curve(run: str, budgets: str | None, target: str, steps: int, memory: str, workers: str | None,
          threads: int | None, trust: bool, plugin_files: tuple[Path, ...]) -> Answer:
    """Loss against size of a run (its folder) or sweep: what was measured, and further budgets or a target."""
    from impq_core.runs.curves import check_wanted, earlier_answer, read_curves, save_curves
    from impq_core.runs.folder import RunFolder

    texts = _split(budgets)
    check_wanted(texts, target, steps)
    folder = RunFolder.open(run)
    if texts or target:
        place = {"memory": memory, "workers": workers or "", "threads": threads or 0}
        return _extend(folder, texts, target, steps, place, Trust(trust), Plugins(plugin_files))
    if workers or threads:
        raise UsageError(f"--{'workers' if workers else 'threads'} goes with --budget or --target: without them "
                         "nothing is measured")
    curves = read_curves(run)
    outcome = earlier_answer(folder, curves)
    save_curves(folder, curves, outcome)
    _show(folder.path, curves, outcome)
    return _answer(folder.path, curves, outcome)


def _extend(folder: RunFolder, budgets: tuple[str, ...], target: str, steps: int, place: Mapping[str, Any],
            trust: Trust, plugins: Plugins) -> Answer:
    config = override(folder.read_config(), **{name: given for name, given in place.items() if given})
    for budget in budgets or (config.budget,):
        check(replace(config, budget=budget), plugins)
    config = watched(config, plugins, brief=True)
    plugins.watch(shown := _Show())
    from impq_core.runs.points import extend_curve

    extend_curve(folder.path, budgets, target, steps, plugins, trust, **place)
    look_at(config)
    return _answer(folder.path, shown.curves, shown.outcome)


def _answer(folder: Path, curves: tuple[Curve, ...], outcome: Outcome | None) -> Answer:
    """The answer of a command about curves."""
    from impq_core.compare.curve import curve_lines
    from impq_core.documents.measured import CurvesDocument

    lines = [line for one in curves
             for line in curve_lines(one, outcome if outcome and outcome.curve.parts == one.parts else None)]
    return Answer(CurvesDocument.of(folder, curves, outcome), [*lines, f"files in {folder}"])


class _Show:
    """Observer that prints curves and draws their picture; it keeps the last ones."""

    def __init__(self) -> None:
        self.curves: tuple[Curve, ...] = ()
        self.outcome: Outcome | None = None

    @hookimpl(tryfirst=True)  # the picture is there when other observers keep the folder's files
    def impq_curve_ready(self, folder: Path, curves: tuple[Curve, ...], answer: Outcome | None) -> None:
        """Print the table, and write the picture."""
        self.curves, self.outcome = curves, answer
        _show(folder, curves, answer)

    @property
    def exported(self) -> list[Path]:
        """Folders of the runs whose plans are exported: of every budget, or of the one found."""
        if self.outcome:
            return [self.outcome.within.run] if self.outcome.within else []
        return [point.run for one in self.curves for point in one.points]


def _show(folder: Path, curves: tuple[Curve, ...], answer: Outcome | None) -> None:
    from impq_core.compare.curve import curve_lines, curve_table, save_picture
    from impq_core.runs.curves import CURVE
    from impq_core.terminal import make_console

    picture = save_picture(curves, answer, folder)
    console = make_console()
    for one in curves:
        console.print(curve_table(one, answer))
        for line in curve_lines(one, answer if answer and answer.curve.parts == one.parts else None):
            click.echo(line)
    click.echo(f"picture in {picture}, numbers in {folder / CURVE}")


def several_budgets(context: click.Context, resume: str | None, target: str, steps: int,
                    given: Mapping[str, Any]) -> Sweep | None:
    """The sweep over budgets that the options of ``impq run`` ask for; None if they ask for a single plan.

    Raises:
        UsageError: an option is wrong, or --target and --budget are both given.
    """
    from impq_core.runs.folder import SWEEP
    from impq_core.runs.grid import Sweep

    if resume:
        if not (Path(resume).expanduser() / SWEEP).is_file():
            return None
        refuse_others(context, "workers")
        sweep = Sweep.open(resume)
        return replace(sweep, base=override(sweep.base, workers=given["workers"]))
    names = ("config_file", "bits", "pins", "exclude", "options", "time_limit", "plugin_files")
    rest = {name: value for name, value in given.items() if name not in names}
    config = read_config(given["config_file"], given["bits"], given["pins"], given["exclude"], rest)
    budgets = _split(config.budget)
    if not target and len(budgets) < 2:
        return None
    from impq_core.runs.curves import check_wanted

    check_wanted(_split(given["budget"]) if target else budgets, target, steps)
    return Sweep(replace(config, budget=""), {} if target else {"budget": budgets},
                 read_pairs(given["options"], given["time_limit"]), target, steps)


def run_budgets(sweep: Sweep, resume: str | None, exports: tuple[str, ...], plugin_files: tuple[Path, ...],
                trust: Trust, dry_run: bool) -> Answer:
    """Measure once, and plan and score every budget; raises ImpqError."""
    plugins = Plugins(plugin_files)
    configs = sweep.configs(plugins)
    for config in configs:
        check(config, plugins)
    load_exporters(configs[0], exports, plugins)
    warn(configs[0], plugins)
    if dry_run:
        from impq_core.terminal import quiet_libraries

        quiet_libraries()
        from impq_core.runs.forecast import forecast_sweep

        return show_forecast(forecast_sweep(sweep, plugins, trust))
    base = watched(sweep.base, plugins, brief=True)
    plugins.watch(shown := _Show())
    from impq_core.exports.export import check_formats
    from impq_core.runs.sweep import run_sweep

    check_formats(configs[0], exports, plugins, trust)
    folder = run_sweep(replace(sweep, base=base), plugins, Path(resume) if resume else None, trust)
    for run in shown.exported:
        for name in exports:
            export_plan(str(run), name, run / name, plugins, trust)
    click.echo(f"runs in {folder / 'runs'}")
    look_at(base)
    return _answer(folder, shown.curves, shown.outcome)


def _split(budgets: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in budgets.split(",")) if budgets else ()
