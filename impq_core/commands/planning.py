"""Commands that need no model: fit, allocate, compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from impq_core.commands.common import part_options, plugin_option, read_pairs
from impq_core.plugins import Plugins


@click.command()
@click.argument("run")
@click.option("--surrogate", "names", multiple=True, help="Surrogate to fit [every one on offer].")
@part_options
def fit(run: str, names: tuple[str, ...], options: tuple[str, ...]) -> None:
    """Fit surrogates to the losses a run (its folder) has measured, and say how well they tell unseen ones."""
    from impq_core.runs.fit import fit_run
    from impq_core.terminal import fit_table, make_console

    found = Plugins()
    for name in names:
        found.find("surrogate", name)
    fits = fit_run(run, names, read_pairs(options), found)
    make_console().print(fit_table(fits))


@click.command()
@click.argument("run")
@click.option("--budget", "budgets", required=True, metavar="BUDGETS",
              help="One or several with commas: 2.5bits,3.25bpw,60MB.")
@click.option("--surrogate", help="Fit the run's losses with this one instead.")
@click.option("--allocator", help="Who makes the plans [the run's].")
@part_options
@plugin_option
def allocate(run: str, budgets: str, surrogate: str | None, allocator: str | None, options: tuple[str, ...],
             plugin_files: tuple[Path, ...]) -> None:
    """Make plans for other budgets from what a run (its folder) has estimated, without the model."""
    from impq_core.runs.allocate import allocate_run
    from impq_core.terminal import make_console, plans_table

    wanted = [part.strip() for part in budgets.split(",")]
    made = allocate_run(run, wanted, surrogate, allocator, read_pairs(options), Plugins(plugin_files))
    make_console().print(plans_table(made))
    first = made[0].file
    click.echo(f"score one on held-out text: impq run --config {first.parent.parent / 'impq.toml'} --plan {first}")


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--html", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True,
              help="Page to write.")
@click.option("--no-html", is_flag=True, help="Write no page.")
def compare(runs: tuple[str, ...], html: Path, no_html: bool) -> None:
    """Hold finished runs against each other: run folders, or folders that contain some [impq-runs]."""
    show(runs or ("impq-runs",), None if no_html else html)


def show(runs: Sequence[str | Path], html: Path | None) -> None:
    """Print finished runs beside each other, and write the page where one is wanted; raises ImpqError."""
    from impq_core.compare.read import gather
    from impq_core.compare.table import contest_table
    from impq_core.terminal import make_console

    contests, notes = gather(runs)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    console = make_console()
    for contest in contests:
        console.print(contest_table(contest))
    if html is not None:
        from impq_core.compare.html import write_page

        write_page(contests, html)
        click.echo(f"page in {html}")
