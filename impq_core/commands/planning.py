"""Commands that need no model: fit, allocate."""

from __future__ import annotations

import click

from impq_core.commands.common import part_options, plugin_option, read_pairs
from impq_core.plugins import Plugins


@click.command()
@click.argument("run")
@click.option("--surrogate", "names", multiple=True, help="Surrogate to fit [every one on offer].")
@part_options
def fit(run: str, names: tuple[str, ...], options: tuple[str, ...]) -> None:
    """Fit surrogates to the losses a run (its folder) has measured, and say how well they tell unseen ones."""
    from impq_core.fit import fit_run
    from impq_core.report import fit_table, make_console

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
             plugin_files: tuple[object, ...]) -> None:
    """Make plans for other budgets from what a run (its folder) has estimated, without the model."""
    from impq_core.allocate import allocate_run
    from impq_core.report import make_console, plans_table

    wanted = [part.strip() for part in budgets.split(",")]
    made = allocate_run(run, wanted, surrogate, allocator, read_pairs(options), Plugins(plugin_files))  # type: ignore[arg-type]
    make_console().print(plans_table(made))
    first = made[0].file
    click.echo(f"score one on held-out text: impq run --config {first.parent.parent / 'impq.toml'} --plan {first}")
