"""Several budgets: ``impq curve``, and ``impq run`` with a list of budgets or a target."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
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
)
from impq_core.commands.exporting import export_plan, load_exporters
from impq_core.hookspecs import hookimpl
from impq_core.plugins import Plugins
from impq_core.target import MOST_STEPS, STEPS
from impq_core.trust import Trust

if TYPE_CHECKING:
    from impq_core.curve import Answer, Curve
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
@click.option("--json", "as_json", is_flag=True, help="Print curve.json instead of a table.")
@click.option("--memory", default="", help="Memory that this may take where blocks compute, such as 8GB [the run's].")
@trust_option
@plugin_option
def curve(run: str, budgets: str | None, target: str, steps: int, as_json: bool, memory: str, trust: bool,
          plugin_files: tuple[Path, ...]) -> None:
    """Loss against size of a run (its folder) or sweep: what was measured, and further budgets or a target."""
    from impq_core.runs.curves import CURVE, check_wanted, earlier_answer, read_curves, save_curves
    from impq_core.runs.folder import RunFolder

    texts = _split(budgets)
    check_wanted(texts, target, steps)
    folder = RunFolder.open(run)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # progress and tables
        if texts or target:
            _extend(folder, texts, target, steps, memory, Trust(trust), Plugins(plugin_files))
        else:
            curves = read_curves(run)
            answer = earlier_answer(folder, curves)
            save_curves(folder, curves, answer)
            _show(folder.path, curves, answer)
    if as_json:
        click.echo((folder.path / CURVE).read_text(), nl=False)


def _extend(folder: RunFolder, budgets: tuple[str, ...], target: str, steps: int, memory: str, trust: Trust,
            plugins: Plugins) -> None:
    config = folder.read_config()
    for budget in budgets:
        check(replace(config, budget=budget), plugins)
    config = watched(config, plugins, brief=True)
    plugins.watch(_Show())
    from impq_core.runs.points import extend_curve

    extend_curve(folder.path, budgets, target, steps, plugins, trust, memory)
    look_at(config)


class _Show:
    """Observer that prints a curve and draws its picture."""

    @hookimpl(tryfirst=True)  # the picture is there when other observers keep the folder's files
    def impq_curve_ready(self, folder: Path, curves: tuple[Curve, ...], answer: Answer | None) -> None:
        """Print the table, and write the picture."""
        _show(folder, curves, answer)


def _show(folder: Path, curves: tuple[Curve, ...], answer: Answer | None) -> None:
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
        refuse_others(context)
        return Sweep.open(resume)
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
                trust: Trust, dry_run: bool, as_json: bool) -> None:
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

        show_forecast(forecast_sweep(sweep, plugins, trust), as_json)
        return
    base = watched(sweep.base, plugins, brief=True)
    plugins.watch(_Show())
    plugins.watch(found := _Found())
    from impq_core.exports.export import check_formats
    from impq_core.runs.sweep import run_sweep

    check_formats(configs[0], exports, plugins, trust)
    folder = run_sweep(replace(sweep, base=base), plugins, Path(resume) if resume else None, trust)
    for run in found.runs:
        for name in exports:
            export_plan(str(run), name, run / name, plugins, trust)
    click.echo(f"runs in {folder / 'runs'}")
    look_at(base)


class _Found:
    """Observer that keeps the folders of the runs whose plans are exported: of every budget, or of the one found."""

    def __init__(self) -> None:
        self.runs: list[Path] = []

    @hookimpl
    def impq_curve_ready(self, curves: tuple[Curve, ...], answer: Answer | None) -> None:
        """Keep the folders."""
        points = [point for one in curves for point in one.points]
        if answer:
            points = [answer.within] if answer.within else []
        self.runs = [point.run for point in points]


def _split(budgets: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in budgets.split(",")) if budgets else ()
