"""The command line. Help and ``impq plugins`` import neither torch nor mlflow."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from impq_core.config import RunConfig, override, read_toml
from impq_core.errors import ImpqError, Terminated, UsageError, nearest
from impq_core.plugins import OFFERED, Plugins

if TYPE_CHECKING:
    from impq_core.export import Exported


class _Commands(click.Group):
    """impq's commands and those of plugins; an unknown one is answered with the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *Plugins().commands()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or Plugins().commands().get(cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"unknown command '{args[0]}'{nearest(args[0], self.list_commands(ctx))}") from error


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"impq {version('impq')}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, callback=_version, expose_value=False, is_eager=True, help="Show the version.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Squeeze a language model below 4 bits a weight, with a plan that knows how layers interact."""


def _text_options(role: str, default: str) -> Any:
    def add(command: Any) -> Any:
        for suffix, kind, text in (("-seed", int, "Seed of the draw."), ("-length", int, "Tokens in a window [256]."),
                                   ("-windows", int, "Windows drawn [64]."),
                                   ("", str, f"{default} text: demo, a .txt/.jsonl/.parquet file, or a datasets name "
                                             "such as wikitext:wikitext-2-raw-v1:test [demo].")):
            command = click.option(f"--{role}{suffix}", type=kind, default=None, help=text)(command)
        return command
    return add


@cli.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=None,
              help="Configuration file [impq.toml, where there is one].")
@click.option("--model", help="demo, a folder, or a hub name [demo].")
@click.option("--backend", help="Who quantizes [gptq].")
@click.option("--estimate-with", metavar="BACKEND", help="Let the estimator measure another backend's variants.")
@click.option("--estimator", help="Who measures or scores the layers [spqe].")
@click.option("--surrogate", help="What is fitted to the measurements [auto].")
@click.option("--allocator", help="Who makes the plan [qp].")
@click.option("--refine", type=int, metavar="FORWARDS", help="Improve the plan by measuring others near it [0: no].")
@click.option("--refiner", help="Who improves it [swaps].")
@click.option("--bits", help="Widths to choose from, such as 2,4 [the backend's].")
@click.option("--budget", help="3.0bits (nominal average), 3.25bpw (stored), 60MB, 4GiB or 60% [the middle].")
@click.option("--granularity", help="block, group (linears that engines fuse) or linear [block].")
@click.option("--pin", "pins", multiple=True, metavar="PATTERN=WIDTH",
              help="Keep the layers that match at a width, such as 'model.layers.0*=4'; their bytes count.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave the layers that match unquantized.")
@_text_options("calibration", "Calibration")
@click.option("--game-windows", type=int, help="Calibration windows the game is played on [8].")
@click.option("--probe-windows", type=int, help="Calibration windows that gradients are taken on [all].")
@click.option("--value", help="What the game measures: nll, or kl to the unquantized model [nll].")
@_text_options("evaluation", "Held-out")
@click.option("--dtype", help="auto, float32 or bfloat16 [auto].")
@click.option("--seed", type=int, help="Seed of every other random draw [0].")
@click.option("--time-limit", type=float, help="Seconds the allocator may take (its option time_limit).")
@click.option("--plan", help="Apply this plan.json instead of estimating and allocating.")
@click.option("--export", "exports", multiple=True, metavar="FORMAT",
              help="Write the plan in this format too; see 'impq plugins'.")
@click.option("--output", help="Folder that run folders are made in [impq-runs].")
@click.option("--tracking-uri", help="MLflow store; 'none' for no tracking [sqlite file mlflow.db here].")
@click.option("--experiment", help="MLflow experiment [impq].")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Let transformers run the model's own code.")
@click.option("-o", "--option", "options", multiple=True, metavar="NAME=VALUE",
              help="Option of a part, such as permutations=20 or backend.group_size=32; see 'impq plugins --options'.")
@click.option("--plugin", "plugin_files", multiple=True, type=click.Path(path_type=Path),
              help="Python file to load as a plugin.")
def run(config_file: Path | None, options: tuple[str, ...], plugin_files: tuple[Path, ...], bits: str | None,
        exports: tuple[str, ...], pins: tuple[str, ...], exclude: tuple[str, ...], time_limit: float | None,
        **given: Any) -> None:
    """Estimate, allocate, quantize and evaluate: one tracked run."""
    from impq_core.parts import Parts, assign_options, load_exporter, slots_of
    from impq_core.source import locate_model
    from impq_core.text import check_source

    plugins = Plugins(plugin_files)
    config = read_toml(config_file) if config_file else RunConfig()
    if config_file is None and Path("impq.toml").is_file():
        config = read_toml(Path("impq.toml"))
    config = override(config, bits=_bits(bits), pins=dict(map(_pin, pins)) or None, exclude=exclude or None, **given)
    pairs = dict(_pair(option) for option in options)
    if time_limit is not None:
        pairs["allocator.time_limit"] = str(time_limit)
    config = override(config, options=assign_options(config, plugins, pairs))
    # Every name, option and file is checked before anything heavy is imported; the pipeline checks the rest.
    parts = Parts.build(config, plugins)
    for name in exports:
        load_exporter(name, config.backend, parts.options().get("backend", {}), plugins)
    locate_model(config.model)
    for text in (config.calibration, config.evaluation) if parts.needs_calibration else (config.evaluation,):
        check_source(text.source)
    for dropped in plugins.dropped:
        click.echo(f"warning: plugin {dropped.what} is not used: {dropped.reason}", err=True)
    for slot, role in slots_of(config).items():
        if notice := plugins.find(role, getattr(config, slot)).notice:
            click.echo(f"note: {notice}", err=True)
    if config.tracking_uri != "none":
        from impq_core.tracking import Tracker, check_store, store_uri

        check_store(store_uri(config.tracking_uri))
        plugins.watch(Tracker(config.tracking_uri, config.experiment))
    from impq_core.report import ConsoleReporter, make_console

    _quiet_libraries()
    plugins.watch(ConsoleReporter(make_console()))
    from impq_core.pipeline import run as run_pipeline

    result = run_pipeline(config, plugins)
    for name in exports:
        _export(str(result.folder), name, result.folder / name, plugins)
    click.echo(f"files in {result.folder}")
    if config.tracking_uri != "none":
        click.echo(f"look at it: impq ui{_uri_flag(config.tracking_uri)}")


@cli.command()
@click.argument("run")
@click.option("--surrogate", "names", multiple=True, help="Surrogate to fit [every one on offer].")
@click.option("-o", "--option", "options", multiple=True, metavar="NAME=VALUE", help="Option of the surrogates.")
def fit(run: str, names: tuple[str, ...], options: tuple[str, ...]) -> None:
    """Fit surrogates to the losses a run (its folder) has measured, and say how well they tell unseen ones."""
    from impq_core.fit import fit_run
    from impq_core.report import fit_table, make_console

    found = Plugins()
    for name in names:
        found.find("surrogate", name)
    fits = fit_run(run, names, dict(_pair(option) for option in options), found)
    make_console().print(fit_table(fits))


@cli.command()
@click.argument("run")
@click.argument("format")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Folder to write [RUN/FORMAT].")
def export(run: str, format: str, target: Path | None) -> None:
    """Write the plan of a run (its folder) as a checkpoint or a recipe; 'impq plugins' lists the formats."""
    found = Plugins()
    found.find("exporter", format)
    _quiet_libraries()
    from impq_core.export import check_target, run_folder
    from impq_core.report import ConsoleReporter, make_console

    target = target or run_folder(run) / format
    check_target(target)
    found.watch(ConsoleReporter(make_console()))
    _export(run, format, target, found)


def _export(run: str, format: str, target: Path, found: Plugins) -> None:
    from impq_core.export import export_run
    from impq_core.report import score_line

    exported = export_run(run, format, target, found, lambda done, total: found.notify(
        "impq_progress", stage="quantize", done=done, total=total))
    if exported.score:
        click.echo(f"quantized block by block, each behind the quantized ones: {score_line(exported.score)}")
        click.echo(_on(exported))
    click.echo(f"{format} in {exported.folder}")


def _on(exported: Exported) -> str:
    return (f"on {exported.text}; {exported.nbytes / 1e6:.2f} MB of quantized weights in a file of "
            f"{exported.file_bytes / 1e6:.2f} MB")


@cli.command()
@click.argument("path")
@click.option("--evaluation", help="Another held-out text than the run's.")
@click.option("--evaluation-windows", type=int, help="Windows drawn from it.")
@click.option("--evaluation-length", type=int, help="Tokens in a window.")
def evaluate(path: str, **text: Any) -> None:
    """Load a checkpoint that 'impq export' wrote and measure it."""
    _quiet_libraries()
    from impq_core.export import evaluate_folder
    from impq_core.report import score_line

    exported = evaluate_folder(path, Plugins(), **text)
    assert exported.score is not None
    click.echo(score_line(exported.score))
    click.echo(f"{_on(exported)}, format {exported.format}")


@cli.command()
@click.option("--options", "show_options", is_flag=True, help="List the options of every part.")
@click.option("--plugin", "plugin_files", multiple=True, type=click.Path(path_type=Path),
              help="Python file to load as a plugin.")
def plugins(show_options: bool, plugin_files: tuple[Path, ...]) -> None:
    """List the parts on offer, and the plugins that could not be used."""
    from impq_core.parts import describe_options

    found = Plugins(plugin_files)
    for role in OFFERED:
        click.echo(f"{role}s")
        for name in found.names(role):
            component = found.find(role, name)
            origin = found.offers[role, name].origin
            note = f"  [{component.remedy()}]" if component.missing() else ""
            click.echo(f"  {name:<12} {component.summary}  ({origin}){note}")
            if show_options:
                for line in describe_options(found, role, name):
                    click.echo(f"      {line}")
    if found.dropped:
        click.echo("not used")
        for dropped in found.dropped:
            click.echo(f"  {dropped.what}: {dropped.reason}")


@cli.command()
@click.option("--tracking-uri", default="", help="MLflow store [sqlite file mlflow.db here].")
@click.option("--port", default=5000, show_default=True, help="Port to serve on.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve on.")
def ui(tracking_uri: str, port: int, host: str) -> None:
    """Serve the MLflow pages of a store until stopped."""
    from impq_core.tracking import check_store, store_uri

    uri = store_uri(tracking_uri)
    check_store(uri)
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ImpqError(f"there is no store {uri} yet: 'impq run' makes one")
    # One worker and no job runner: the pages of one person need no more, and start in a third of the time.
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    click.echo(f"serving {uri} on http://{host}:{port} (Ctrl-C stops)")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", host,
                               "--port", str(port), "--workers", "1"], environment)


def _bits(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--bits takes widths such as 2,4, not '{text}'") from error


def _pin(text: str) -> tuple[str, float]:
    pattern, _, width = text.rpartition("=")
    try:
        return pattern or "?", float(width)
    except ValueError as error:
        raise UsageError(f"--pin takes PATTERN=WIDTH, not '{text}'") from error


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"-o takes NAME=VALUE, not '{text}'")
    return name.strip().replace("-", "_"), value.strip()


def _uri_flag(uri: str) -> str:
    return f" --tracking-uri {uri}" if uri else ""


def _quiet_libraries() -> None:
    """Keep other libraries' banners and bars out of our output; their errors still come through."""
    import logging

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _warn(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    if category is RuntimeWarning:
        click.echo(f"warning: {message}", err=True)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


@cli.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--html", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True,
              help="Page to write.")
@click.option("--no-html", is_flag=True, help="Write no page.")
def compare(runs: tuple[str, ...], html: Path, no_html: bool) -> None:
    """Hold finished runs against each other: run folders, or folders that contain some [impq-runs]."""
    from impq_core.compare_read import gather
    from impq_core.compare_table import contest_table
    from impq_core.report import make_console

    contests, notes = gather(runs or ("impq-runs",))
    for note in notes:
        click.echo(f"note: {note}", err=True)
    console = make_console()
    for contest in contests:
        console.print(contest_table(contest))
    if not no_html:
        from impq_core.compare_html import write_page

        write_page(contests, html)
        click.echo(f"page in {html}")


def main(arguments: list[str] | None = None) -> None:
    """The ``impq`` command: 0, 1 for what the user can mend, 2 for usage, 130 and 143 for Ctrl-C and SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _warn
    try:
        cli.main([a for a in arguments if a != "--debug"], prog_name="impq", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo("impq: stopped", err=True)
        sys.exit(143 if isinstance(error.__cause__, Terminated) else 130)  # click wraps it in its Abort
    except click.ClickException as error:
        click.echo(f"impq: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except ImpqError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"impq: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        line = " ".join(str(error).split())[:300]
        click.echo(f"impq: {type(error).__name__}: {line} (this is a bug of impq or of a plugin; "
                   "--debug shows where)", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
