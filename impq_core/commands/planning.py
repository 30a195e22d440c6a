"""Commands that read no weights: fit, allocate, import, compare, show."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from impq_core.commands.common import limit_option, part_options, plugin_option, read_pairs, trust_option
from impq_core.commands.output import Answer, answers
from impq_core.errors import ImpqError, UsageError
from impq_core.plugins import Plugins

if TYPE_CHECKING:
    from impq_core.documents.comparison import ComparisonDocument
    from impq_core.results import RunResult
    from impq_core.runs.reading import Progress


@click.command()
@click.argument("run")
@click.option("--surrogate", "names", multiple=True, help="Surrogate to fit [all installed ones].")
@part_options
@answers
def fit(run: str, names: tuple[str, ...], options: tuple[str, ...]) -> Answer:
    """Fit surrogates to the measured losses of a run (its folder), and cross-validate them."""
    from impq_core.documents.planning import FitsDocument
    from impq_core.runs.fit import fit_run
    from impq_core.terminal import fit_table, make_console

    plugins = Plugins()
    for name in names:
        plugins.find("surrogate", name)
    fits = fit_run(run, names, read_pairs(options), plugins)
    make_console().print(fit_table(fits))
    return Answer(FitsDocument.of(fits), [f"{fit.surrogate} in {fit.file}" for fit in fits.surrogates if fit.estimate])


@click.command()
@click.argument("run")
@click.option("--budget", "budgets", required=True, metavar="BUDGETS",
              help="Budgets, separated by commas: 2.5bits,3.25bpw,60MB.")
@click.option("--surrogate", help="Fit this surrogate to the run's losses [the run's estimate].")
@click.option("--allocator", help="Allocator: makes the plans [the run's].")
@limit_option
@part_options
@plugin_option
@answers
def allocate(run: str, budgets: str, surrogate: str | None, allocator: str | None, limits: dict[str, str] | None,
             options: tuple[str, ...], plugin_files: tuple[Path, ...]) -> Answer:
    """Make plans for other budgets from the estimate of a run (its folder), without the model."""
    from impq_core.documents.planning import PlansDocument
    from impq_core.runs.allocate import allocate_run
    from impq_core.terminal import make_console, plans_table

    texts = [part.strip() for part in budgets.split(",")]
    plans = allocate_run(run, texts, surrogate, allocator, read_pairs(options), Plugins(plugin_files), limits)
    make_console().print(plans_table(plans))
    first = plans[0].file
    click.echo(f"score one on held-out text: impq run --config {first.parent.parent / 'impq.toml'} --plan {first}")
    return Answer(PlansDocument.of(plans), [f"{each.budget} in {each.file}" for each in plans])


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The unquantized model: demo, a folder, or a hub name.")
@click.option("--backend", default="gguf", show_default=True, help="Backend that has the widths of the file.")
@click.option("--to", "target", type=click.Path(path_type=Path), default=Path("plan.json"), show_default=True,
              help="Plan file to write.")
@click.option("--quantize-embeddings", "embeddings", is_flag=True, help="Read the widths of embedding and head, too.")
@trust_option
@plugin_option
@answers
def import_file(file: Path, model: str, backend: str, target: Path, embeddings: bool, trust: bool,
                plugin_files: tuple[Path, ...]) -> Answer:
    """Read the widths in a file that other software made, such as a GGUF, as a plan of single linears."""
    plugins = Plugins(plugin_files)
    plugins.find("backend", backend)
    if not file.is_file():
        raise ImpqError(f"{file}: no such file")
    if target.exists():
        raise UsageError(f"{target} exists: give another file with --to")
    from impq_core.documents.runs import PlanDocument
    from impq_core.runs.importing import import_plan
    from impq_core.terminal import quiet_libraries
    from impq_core.trust import Trust

    quiet_libraries()
    plan = import_plan(file, model, backend, plugins, Trust(trust), embeddings)
    plan.save(target)
    counts = Counter(str(choice) for choice in plan.widths().values())
    click.echo(f"{file.name}: {', '.join(f'{count} linears {name}' for name, count in counts.most_common())}; "
               f"{plan.nbytes / 1e6:.2f} MB, {plan.space.bits_per_weight(plan.nbytes):.2f} stored bits a weight")
    click.echo(f"measure it: impq run --model {shlex.quote(model)} --backend {backend} --plan "
               f"{shlex.quote(str(target))}; a plan of that size: --budget {plan.nbytes}B")
    return Answer(PlanDocument.of(plan, target), [f"plan in {target}"])


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--html", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True,
              help="File of the page.")
@click.option("--no-html", is_flag=True, help="Write no page.")
@answers
def compare(runs: tuple[str, ...], html: Path, no_html: bool) -> Answer:
    """Compare finished runs: run folders, or folders of run folders [impq-runs]."""
    compared = print_comparison(runs or ("impq-runs",), None if no_html else html)
    return Answer(compared, best_lines(compared))


def print_comparison(runs: Sequence[str | Path], html: Path | None) -> ComparisonDocument:
    """Print tables that compare finished runs, and write the page unless ``html`` is None; raises ImpqError."""
    from impq_core.compare.read import gather
    from impq_core.compare.table import contest_table
    from impq_core.documents.comparison import ComparisonDocument
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
    return ComparisonDocument.of(contests, notes, html)


def best_lines(compared: ComparisonDocument) -> list[str]:
    """A line for the best plan of each budget, and one for the page."""
    best = [f"budget {run.budget}: {run.label}, {run.verdict}" for contest in compared.contests
            for run in contest.runs if run.minus_best_nats is None]
    return [*best, *([f"page in {compared.page}"] if compared.page else [])]


@click.command()
@click.argument("run")
@answers
def show(run: str) -> Answer:
    """Print the plan, the widths and the table of a run (its folder) again, as the run ended with them."""
    from impq_core.documents.runs import RunDocument
    from impq_core.exports.manifest import exports_in
    from impq_core.runs.reading import open_run, progress_of, read_run
    from impq_core.terminal import make_console, print_result

    folder, progress = open_run(run), progress_of(run)
    if not folder.plan.is_file() and not folder.estimate.is_file():
        line = progress_line(progress)
        click.echo(line)
        return Answer(RunDocument.unfinished(folder.path, folder.read_config(), folder.read_space(),
                                             progress.error or None), [line])
    result = read_run(run)
    click.echo(f"run folder {result.folder}")
    print_result(result, make_console())
    for exported in exports_in(result.folder):
        click.echo(f"{exported.name} in {exported}")
    if result.state != "finished":
        click.echo(progress_line(progress))
    return run_answer(result, progress.error)


def run_answer(result: RunResult, error: str = "") -> Answer:
    """The answer of a run: its last lines are those of its plan, its score and its folder."""
    from impq_core.documents.runs import RunDocument
    from impq_core.terminal import last_lines

    return Answer(RunDocument.of(result, error or None), last_lines(result))


def progress_line(progress: Progress) -> str:
    """What a run has on disk, and how to go on."""
    done = [f"{count} {name}" for count, name in ((progress.losses, "losses"), (progress.gradients, "gradients"),
                                                  (progress.scores, "held-out scores")) if count]
    state = "a process works in it" if progress.working else (
        f"it ended with {progress.error}" if progress.error else "it ended early")
    return (f"{progress.folder.name} has not finished: {', '.join(done) or 'nothing measured'} on disk; {state}"
            + ("" if progress.working else f"; impq run --resume {shlex.quote(str(progress.folder))} goes on"))
