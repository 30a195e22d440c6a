"""Shared code of the commands: the options of a run, the configuration they make, and the observers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from impq_core.commands.output import Answer
from impq_core.config import RunConfig, override, read_toml
from impq_core.errors import UsageError
from impq_core.plugins import Plugins

if TYPE_CHECKING:
    from impq_core.runs.forecast import Forecast

Command = Callable[..., Any]


def _text_options(role: str, default: str) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for suffix, kind, text in (("-seed", int, "Seed of the draw."), ("-length", int, "Tokens in a window [256]."),
                                   ("-windows", int, "Number of windows drawn [64]."),
                                   ("-scored", str, "Tokens of chats that count in losses: all, or those of the "
                                                    "assistant [all].")):
            command = click.option(f"--{role}{suffix}", type=kind, default=None, help=text)(command)
        several = {"calibration": "SOURCE=WEIGHT for a share of a mixture",
                   "evaluation": "NAME=SOURCE for a column of that name"}[role]
        return click.option(
            f"--{role}", multiple=True, callback=several_or_none, metavar="SOURCE",
            help=f"{default} text: demo, a .txt/.jsonl/.parquet file, or a datasets name such as "
                 f"wikitext:wikitext-2-raw-v1:test [demo]. Several times: {several}.")(command)
    return add


def several_or_none(_context: click.Context, _option: click.Parameter,
                    given: tuple[str, ...]) -> tuple[str, ...] | None:
    """The values of an option that may be given several times; None if it is not given."""
    return given or None


def _yes_or_no(_context: click.Context, _option: click.Parameter, given: bool | None) -> str | None:
    return {None: None, True: "yes", False: "no"}[given]


part_options = click.option(
    "-o", "--option", "options", multiple=True, metavar="NAME=VALUE",
    help="Option of a part, such as permutations=20 or backend.group_size=32; see 'impq plugins --options'.")

plugin_option = click.option("--plugin", "plugin_files", multiple=True, type=click.Path(path_type=Path),
                             help="Python file to load as a plugin.")

trust_option = click.option("--trust-remote-code", "trust", is_flag=True,
                            help="Permit this command to run code from the model's folder.")

tracking_option = click.option("--tracking-uri",
                               help="MLflow store; 'none' for no tracking [MLFLOW_TRACKING_URI, or sqlite:///mlflow.db].")


def _limits(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str] | None:
    limits: dict[str, str] = {}
    for text in given:
        name, equals, amount = (part.strip() for part in text.partition("="))
        if not equals or not name or not amount:
            raise UsageError(f"--limit takes COST=AMOUNT, such as latency=9ms, not '{text}'")
        if name in limits:
            raise UsageError(f"--limit gives {name} twice")
        limits[name] = amount
    return limits or None


limit_option = click.option("--limit", "limits", multiple=True, metavar="COST=AMOUNT", callback=_limits,
                            help="The most that the plan may take of a meter's cost, such as latency=9ms.")


def place_options(command: Command) -> Command:
    """``--device`` and ``--memory`` of a command on a run or an export."""
    command = click.option("--memory", help="Memory that this may take where blocks compute, such as 8GB [a run's; "
                                            "what is free for an export].")(command)
    return click.option("--device", help="Where blocks compute: auto, cpu, cuda, cuda:1, mps or xpu [a run's; auto for "
                                         "an export].")(command)


def workers_options(workers: str, threads: str) -> Callable[[Command], Command]:
    """``--workers`` and ``--threads``, with what they are by default."""
    def add(command: Command) -> Command:
        command = click.option("--threads", type=click.IntRange(min=1),
                               help=f"Threads of the processor for each process [{threads}].")(command)
        return click.option(
            "--workers", metavar="N|auto|ADDRESS",
            help="Share the work between N processes, one for each accelerator or core (auto), or those of a cluster, "
                 f"such as ray://10.0.0.1:6379; no number depends on it [{workers}].")(command)
    return add


def dry_run_option(command: Command) -> Command:
    """``--dry-run``."""
    return click.option("--dry-run", is_flag=True,
                        help="Forecast layers, bytes, forwards, memory and disk; no weight is read, nothing is "
                             "written.")(command)


def run_options(several: bool = False, budgets: bool = False) -> Callable[[Command], Command]:
    """The options of a run's configuration. With ``several``, parts and budget take lists; with ``budgets``, the budget
    does."""
    more = " (several, separated by commas)" if several else ""
    many = " (several, separated by commas)" if several or budgets else ""
    options: list[Callable[[Command], Command]] = [
        click.option("--config", "config_file", type=click.Path(path_type=Path), default=None,
                     help="Configuration file [impq.toml, if it exists]."),
        click.option("--model", help="Model: demo, a folder, or a hub name [demo]."),
        click.option("--backend", help=f"Backend: the quantizer{more} [gptq]."),
        click.option("--estimate-with", metavar="BACKEND",
                     help="Backend for the estimator's measurements, if it differs from the deployed one."),
        click.option("--estimator", help=f"Estimator: measures or scores the layers{more} [guided-output]."),
        click.option("--surrogate", help=f"Surrogate: the model fitted to measured losses{more} [auto]."),
        click.option("--allocator", help=f"Allocator: makes the plan from the estimate{more} [qp]."),
        click.option("--refine", type=int, metavar="FORWARDS",
                     help="Improve the plan by measuring plans near it, for at most this many forwards [0: no]."),
        click.option("--refiner", help="Refiner: improves the plan if --refine is given [swaps]."),
        click.option("--fallback/--no-fallback", default=None, callback=_yes_or_no,
                     help="Take the largest uniform model within the budget if the estimated plan does not beat it on "
                          "calibration windows that are held back for that [yes; no for a sweep over parts]."),
        click.option("--bits", help="Widths of the menu, such as 2,4 or 2,3@128,4 (groups of 128) or IQ2_XS,Q4_K "
                               "[the backend's default]."),
        click.option("--budget", help=f"Size of the plan: 3.0bits (nominal average), 3.25bpw (stored), 60MB, 4GiB or "
                                      f"60%{many} [the middle of the menu]."),
        click.option("--whole", is_flag=True, default=None,
                     help="The budget bounds the file of an export, with embeddings, head and metadata."),
        click.option("--meter", "meters", multiple=True, metavar="NAME", callback=several_or_none,
                     help="Also show a cost of plans beside their bytes, such as the latency of llamacpp; see 'impq "
                          "plugins'."),
        limit_option,
        click.option("--granularity", help="Size of a layer: block, group (fused linears), expert or linear "
                                           "[group, or block for estimators that play the game]."),
        click.option("--quantize-embeddings", is_flag=True, default=None,
                     help="Make layers of the input embedding and the head too."),
        click.option("--pin", "pins", multiple=True, metavar="PATTERN=WIDTH",
                     help="Fix the width of matching layers, such as 'model.layers.0*=4'; their bytes count."),
        click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave matching layers unquantized."),
        _text_options("calibration", "Calibration"),
        click.option("--game-windows", type=int, help="Number of calibration windows of the game [8]."),
        click.option("--probe-windows", type=int, help="Number of calibration windows for gradients [all]."),
        click.option("--value", help="Loss of the game: nll, or kl to the unquantized model [nll]."),
        _text_options("evaluation", "Held-out"),
        click.option("--sequential/--no-sequential", default=None,
                     callback=_yes_or_no,
                     help="Score plan and references as an export makes them: quantized in sequence [if it costs no "
                          "more forwards than the search]."),
        click.option("--device", help="Where blocks compute: auto (an accelerator, else the processor), cpu, cuda, "
                                      "cuda:1, mps or xpu [auto]."),
        click.option("--dtype", help="Type of the forwards: auto, float32, bfloat16 or float16 [auto]."),
        click.option("--memory", help="Memory that the run may take where blocks compute, such as 8GB; if the model "
                                      "does not fit, its blocks stay on disk until they work [what is free]."),
        click.option("--prefix", help="How blocks in front are quantized while statistics for the variants of the "
                                      "search are collected: widest or unquantized [widest]."),
        workers_options("none", "torch's; 1 with workers and no accelerator"),
        click.option("--seed", type=int, help="Seed of all random draws but those of the texts [0]."),
        click.option("--time-limit", type=float, help="Time limit of the allocator in seconds (its option time_limit); "
                                                      "plans then depend on the speed of the machine."),
        click.option("--plan", help="Apply this plan.json instead of estimating and allocating."),
        click.option("--output", help="Folder for run folders [impq-runs]."),
        tracking_option,
        click.option("--experiment", help="MLflow experiment [MLFLOW_EXPERIMENT_NAME, or impq]."),
        click.option("--cache/--no-cache", default=None, help="Keep variants and scores in the cache for later runs "
                                                               "[yes]."),
        click.option("--partial", is_flag=True, default=None,
                     help="Continue even if less than half of the weights in the blocks can be quantized."),
        trust_option, part_options, plugin_option]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command
    return add


def read_config(config_file: Path | None, bits: str | None, pins: tuple[str, ...], exclude: tuple[str, ...],
                given: Mapping[str, Any]) -> RunConfig:
    """The configuration file overridden by the command line, without the options of parts; raises UsageError."""
    config = read_toml(config_file) if config_file else RunConfig()
    if config_file is None and Path("impq.toml").is_file():
        config = read_toml(Path("impq.toml"))
    return override(config, bits=_bits(bits), pins=dict(map(_pin, pins)) or None, exclude=exclude or None, **given)


def read_pairs(options: tuple[str, ...], time_limit: float | None = None) -> dict[str, str]:
    """``-o NAME=VALUE`` as a table; raises UsageError."""
    pairs = dict(map(_pair, options))
    return pairs if time_limit is None else {**pairs, "allocator.time_limit": str(time_limit)}


def check(config: RunConfig, plugins: Plugins) -> None:
    """Check names, options, files and texts without a heavy import; raises ImpqError."""
    from impq_core.model.source import locate_model
    from impq_core.model.text import check_texts
    from impq_core.parts import Parts, load_crew

    parts = Parts.build(config, plugins)
    load_crew(config, plugins)
    locate_model(config.model)
    if parts.needs_calibration:
        check_texts(config.calibration, "calibration")
    check_texts(config.evaluation, "evaluation")


def warn(config: RunConfig, plugins: Plugins) -> None:
    """Print the plugins that are not used, and the notices of the chosen parts."""
    from impq_core.parts import name_in, slots_of

    for dropped in plugins.dropped:
        click.echo(f"warning: plugin {dropped.name} is not used: {dropped.reason}", err=True)
    for slot, role in slots_of(config).items():
        if notice := plugins.find(role, name_in(config, slot)).notice:
            click.echo(f"note: {notice}", err=True)


def watched(config: RunConfig, plugins: Plugins, brief: bool = False) -> RunConfig:
    """Register the observers of a run (MLflow and the terminal).

    Returns:
        The configuration with the resolved tracking store and experiment.

    Raises:
        ImpqError: the store does not answer.
    """
    from dataclasses import replace

    from impq_core.terminal import ConsoleReporter, make_console, quiet_libraries

    if config.tracking_uri != "none":
        from impq_core.tracking.logged_model import ExportTracker
        from impq_core.tracking.store import check_store, experiment_name, store_uri
        from impq_core.tracking.tracker import Tracker

        config = replace(config, tracking_uri=store_uri(config.tracking_uri),
                         experiment=experiment_name(config.experiment))
        check_store(config.tracking_uri)
        plugins.watch(Tracker(config.tracking_uri, config.experiment))
        plugins.watch(ExportTracker())
    quiet_libraries()
    plugins.watch(ConsoleReporter(make_console(), brief))
    click.echo(f"{config.model}: reading its configuration and the texts")
    sys.stdout.flush()  # the imports that follow take seconds
    return config


def refuse_others(context: click.Context, *allowed: str) -> None:
    """Raises UsageError if an option was given that --resume does not allow: any but those that change no result."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if (name not in ("resume", "plugin_files", "exports", "trust", "as_json", "quiet", *allowed)
                and context.get_parameter_source(name) is ParameterSource.COMMANDLINE):
            raise UsageError(f"--resume continues a run with its own configuration: leave out {parameter.opts[-1]}")


def show_forecast(forecast: Forecast) -> Answer:
    """Print a forecast."""
    from impq_core.documents.forecasts import ForecastDocument
    from impq_core.forecast_lines import forecast_lines

    lines = forecast_lines(forecast)
    for line in lines:
        click.echo(line)
    for line in forecast.warnings:
        click.echo(f"warning: {line}", err=True)
    return Answer(ForecastDocument.of(forecast), [line for line in lines if line.startswith(("memory:", "disk:"))])


def look_at(config: RunConfig) -> None:
    """Print the command that shows the run in MLflow."""
    from impq_core.credentials import without_secret
    from impq_core.tracking.store import store_uri

    if config.tracking_uri != "none":
        default = config.tracking_uri == store_uri("")
        flag = "" if default else f" --tracking-uri {shlex.quote(without_secret(config.tracking_uri))}"
        click.echo(f"look at it: impq ui{flag}")


def _bits(text: str | None) -> tuple[str, ...] | None:
    names = None if text is None else tuple(part.strip() for part in text.split(","))
    if names is not None and not all(names):
        raise UsageError(f"--bits takes widths such as 2,4, not '{text}'")
    return names


def _pin(text: str) -> tuple[str, str]:
    pattern, _, width = text.rpartition("=")
    if not pattern or not width.strip():
        raise UsageError(f"--pin takes PATTERN=WIDTH, not '{text}'")
    return pattern, width


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"-o takes NAME=VALUE, not '{text}'")
    return name.strip().replace("-", "_"), value.strip()
