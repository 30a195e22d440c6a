"""Commands that load the model: run, estimate, sweep, export, evaluate, rotate."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from impq_core.commands.common import (
    check,
    dry_run_option,
    look_at,
    place_options,
    plugin_option,
    read_config,
    read_pairs,
    refuse_others,
    run_options,
    several_or_none,
    show_forecast,
    trust_option,
    warn,
    watched,
)
from impq_core.commands.curve import run_budgets, several_budgets, target_options
from impq_core.commands.exporting import export_answer, export_plan, load_exporters, show_others, size_line
from impq_core.commands.measuring import TaskOptions, show_tasks, task_options
from impq_core.commands.output import Answer, answers
from impq_core.commands.planning import best_lines, print_comparison, run_answer
from impq_core.config import RunConfig, override
from impq_core.errors import UsageError
from impq_core.plugins import ROLES, Plugins
from impq_core.trust import Trust

RESUME = click.option("--resume", metavar="FOLDER", help="Continue the run in this folder with its configuration; "
                                                         "only --plugin, --export, --memory (of a run), "
                                                         "--workers, --trust-remote-code may be added.")


@click.command()
@RESUME
@click.option("--export", "exports", multiple=True, metavar="FORMAT",
              help="Also export the plan in this format; see 'impq plugins'.")
@dry_run_option
@target_options
@run_options(budgets=True)
@answers
@click.pass_context
def run(context: click.Context, /, resume: str | None, exports: tuple[str, ...], target: str, steps: int, dry_run: bool,
        trust: bool, **given: Any) -> Answer:
    """Estimate, allocate, quantize and evaluate: one tracked run; or one for each of several budgets, from one
    estimate."""
    permitted = Trust(trust)
    if several := several_budgets(context, resume, target, steps, given):
        return run_budgets(several, resume, exports, given["plugin_files"], permitted, dry_run)
    plugins, config = _configure(context, resume, given)
    exporters = load_exporters(config, exports, plugins)
    warn(config, plugins)
    if dry_run:
        from impq_core.terminal import quiet_libraries

        quiet_libraries()
        from impq_core.runs.forecast import forecast_run

        checkpoints = sum(bool(exporter.backends) for exporter in exporters)
        return show_forecast(forecast_run(config, plugins, permitted, checkpoints))
    config = watched(config, plugins)
    from impq_core.exports.export import check_formats
    from impq_core.runs import pipeline

    check_formats(config, exports, plugins, permitted)
    result = (pipeline.resume(resume, plugins, permitted, config.memory, config.workers) if resume
              else pipeline.run(config, plugins, trust=permitted))
    for name in exports:
        export_plan(str(result.folder), name, result.folder / name, plugins, permitted)
    click.echo(f"files in {result.folder}")
    look_at(config)
    return run_answer(result)


@click.command()
@run_options()
@answers
@click.pass_context
def estimate(context: click.Context, /, trust: bool, **given: Any) -> Answer:
    """Only estimate; 'impq allocate' makes plans from the estimate, 'impq run --resume' finishes the run."""
    plugins, config = _configure(context, None, given)
    if config.plan or config.refine:
        raise UsageError("'impq estimate' makes no plan: use --plan and --refine with 'impq run'")
    warn(config, plugins)
    config = watched(config, plugins)
    from impq_core.runs import pipeline

    result = pipeline.run(config, plugins, only_estimate=True, trust=Trust(trust))
    click.echo(f"plans from it: impq allocate {result.folder} --budget 2.5bits,3bits")
    look_at(config)
    return run_answer(result)


def _configure(context: click.Context, resume: str | None, given: dict[str, Any]) -> tuple[Plugins, RunConfig]:
    """Plugins and configuration, checked without heavy imports."""
    from impq_core.parts import assign_options
    from impq_core.runs.folder import RunFolder

    plugins = Plugins(given.pop("plugin_files"))
    options, time_limit, bits = (given.pop(name) for name in ("options", "time_limit", "bits"))
    config_file, pins, exclude = (given.pop(name) for name in ("config_file", "pins", "exclude"))
    if resume:
        refuse_others(context, "memory", "workers")
        config = RunFolder.open(resume, "provenance.json").read_config()
        config = override(config, memory=given["memory"], workers=given["workers"])
    else:
        config = read_config(config_file, bits, pins, exclude, given)
        config = override(config, options=assign_options(config, plugins, read_pairs(options, time_limit)))
    check(config, plugins)
    return plugins, config


@click.command()
@RESUME
@dry_run_option
@run_options(several=True)
@answers
@click.pass_context
def sweep(context: click.Context, /, resume: str | None, dry_run: bool, trust: bool, **given: Any) -> Answer:
    """Run every combination of the given estimators, surrogates, allocators, backends and budgets, with one measurement
    for each estimator and backend."""
    from impq_core.runs.grid import Sweep

    plugins = Plugins(given.pop("plugin_files"))
    options, time_limit, bits = (given.pop(name) for name in ("options", "time_limit", "bits"))
    config_file, pins, exclude = (given.pop(name) for name in ("config_file", "pins", "exclude"))
    if resume:
        refuse_others(context, "workers")
        plan = Sweep.open(resume)
        plan = replace(plan, base=override(plan.base, workers=given["workers"]))
    else:
        lists = {name: tuple(part.strip() for part in text.split(",")) for name in (*ROLES, "budget")
                 if (text := given.pop(name)) is not None}
        config = read_config(config_file, bits, pins, exclude, given)
        plan = Sweep(config, lists, read_pairs(options, time_limit))
    configs = plan.configs(plugins)
    for config in configs:
        check(config, plugins)
    warn(configs[0], plugins)
    if dry_run:
        from impq_core.terminal import quiet_libraries

        quiet_libraries()
        from impq_core.runs.forecast import forecast_sweep

        return show_forecast(forecast_sweep(plan, plugins, Trust(trust)))
    from impq_core.documents.comparison import SweepDocument
    from impq_core.runs.sweep import failed_runs, run_sweep

    base = watched(plan.base, plugins, brief=True)
    folder = run_sweep(replace(plan, base=base), plugins, Path(resume) if resume else None, Trust(trust))
    compared = print_comparison([folder], folder / "compare.html")
    look_at(base)
    return Answer(SweepDocument(str(folder), failed_runs(folder), compared),
                  [*best_lines(compared), f"files in {folder}"])


@click.command()
@click.argument("run")
@click.argument("format")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Folder to write [RUN/FORMAT].")
@click.option("--device", help="Where blocks compute: auto, cpu, cuda, cuda:1, mps or xpu [the run's].")
@click.option("--memory", help="Memory that this may take where blocks compute, such as 8GB [the run's].")
@trust_option
@plugin_option
@answers
def export(run: str, format: str, target: Path | None, device: str | None, memory: str | None, trust: bool,
           plugin_files: tuple[Path, ...]) -> Answer:
    """Write the plan of a run (its folder) as a checkpoint or a recipe; 'impq plugins' lists the formats."""
    plugins = Plugins(plugin_files)
    plugins.find("exporter", format)
    from impq_core.exports.manifest import check_target
    from impq_core.runs.folder import RunFolder
    from impq_core.terminal import ConsoleReporter, make_console, quiet_libraries
    from impq_core.tracking.logged_model import ExportTracker

    quiet_libraries()
    target = target or RunFolder.open(run, "plan.json").path / format
    check_target(target)
    plugins.watch(ExportTracker())
    plugins.watch(ConsoleReporter(make_console()))
    return export_answer(export_plan(run, format, target, plugins, Trust(trust), device, memory))


@click.command()
@click.argument("path")
@click.option("--evaluation", multiple=True, callback=several_or_none, metavar="SOURCE",
              help="Held-out text [the run's]. Several times: NAME=SOURCE for a score of that name.")
@click.option("--evaluation-windows", type=int, help="Number of windows drawn from it.")
@click.option("--evaluation-length", type=int, help="Tokens in a window.")
@click.option("--evaluation-scored", help="Tokens of chats that count: all, or those of the assistant.")
@task_options
@place_options
@trust_option
@plugin_option
@answers
def evaluate(path: str, asked: TaskOptions, device: str | None, memory: str | None, trust: bool,
             plugin_files: tuple[Path, ...], **text: Any) -> Answer:
    """Load a checkpoint of 'impq export', and measure its loss on held-out text; with --tasks, measure it, or the plan
    and references of a run, on tasks of lm-eval and files of questions."""
    from impq_core.exports.manifest import read_manifest

    if asked.tasks is not None:
        if given := next((name for name, value in text.items() if value is not None), None):
            raise UsageError(f"--{given.replace('_', '-')} is for held-out text: leave it out with --tasks")
        return show_tasks(path, asked, Plugins(plugin_files), Trust(trust), device, memory)
    read_manifest(Path(path))
    from impq_core.terminal import quiet_libraries, score_line

    quiet_libraries()
    from impq_core.exports.export import evaluate_folder

    exported = evaluate_folder(path, Plugins(plugin_files), Trust(trust), device or "auto", memory or "", **text)
    assert exported.score is not None
    click.echo(score_line(exported.score))
    click.echo(f"{size_line(exported)}, format {exported.format}")
    show_others(exported)
    return export_answer(exported)


@click.command()
@click.argument("model")
@click.option("--to", "target", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--block", type=int, default=64, show_default=True,
              help="Size of the Hadamard blocks, a power of two; that of a quantization group is best.")
@click.option("--order", type=click.Choice(["sequency", "sylvester"]), default="sequency", show_default=True,
              help="Order of the rows in a block.")
@click.option("--residual/--no-residual", default=True, help="Rotate the hidden states [yes].")
@click.option("--values/--no-values", default=True, help="Rotate values and outputs of attentions [yes].")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              help="Type of the stored weights [auto: the model's].")
@trust_option
@answers
def rotate(model: str, target: Path, block: int, order: str, residual: bool, values: bool, dtype: str,
           trust: bool) -> Answer:
    """Write a model that computes what MODEL computes, with weights rotated, which may lose less when quantized."""
    from impq_core.exports.manifest import check_target
    from impq_core.model.source import locate_model

    if not residual and not values:
        raise UsageError("--no-residual and --no-values together leave nothing to rotate")
    if block < 2 or block & (block - 1):
        raise UsageError(f"--block takes a power of two, not {block}")
    check_target(target)
    locate_model(model, trust)
    from impq_core.terminal import quiet_libraries

    quiet_libraries()
    from impq_core.exports.rotated import rotate_model

    written = rotate_model(model, target, block, order, residual, values, dtype, Trust(trust))
    done = written.rotated
    parts = [f"hidden states in blocks of {done.block}"] * bool(done.block) + [
        f"values and outputs in {done.attentions} of {done.blocks} blocks"] * values
    click.echo(f"rotated: {'; '.join(parts)}")
    click.echo(f"in float32 the same logits to {written.difference:.1g} of the largest; stored as {written.dtype}, "
               f"which costs a divergence of {written.rounding:.2g} nats")
    if done.untied:
        click.echo(f"the head was tied, and now has {written.untied_bytes / 1e6:.2f} MB of its own")
    click.echo(f"{written.file_bytes / 1e6:.2f} MB in {written.folder}; quantize it: impq run --model "
               f"{shlex.quote(str(written.folder))}")
    from impq_core.documents.installation import RotatedDocument

    document = RotatedDocument(str(written.folder), written.dtype, done.block, done.attentions, written.difference,
                               written.rounding, written.untied_bytes, written.file_bytes)
    return Answer(document, [f"{written.file_bytes / 1e6:.2f} MB in {written.folder}"])
