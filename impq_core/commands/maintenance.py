"""Commands for the installation, the cache and the tracking store: plugins, cache, doctor, ui."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from impq_core.commands.common import plugin_option
from impq_core.credentials import without_secret
from impq_core.errors import ImpqError, UsageError
from impq_core.plugins import OFFERED, Plugins


@click.group(invoke_without_command=True)
@click.option("--options", "show_options", is_flag=True, help="List the options of every component.")
@plugin_option
@click.pass_context
def plugins(context: click.Context, show_options: bool, plugin_files: tuple[Path, ...]) -> None:
    """List the components of all plugins, and the plugins that cannot be used; 'impq plugins new' writes one."""
    from impq_core.parts import describe_options

    if context.invoked_subcommand:
        return
    installed = Plugins(plugin_files)
    width = max(len(name) for _, name in installed.offers)
    for role in OFFERED:
        click.echo(f"{role}s")
        for name in installed.names(role):
            component = installed.find(role, name)
            origin = installed.offers[role, name].origin
            note = f"  [{component.remedy()}]" if component.missing() else ""
            click.echo(f"  {name:<{width}} {component.summary}  ({origin}){note}")
            if show_options:
                for line in describe_options(installed, role, name):
                    click.echo(f"      {line}")
    if installed.dropped:
        click.echo("not used")
        for dropped in installed.dropped:
            click.echo(f"  {dropped.name}: {dropped.reason}")


@plugins.command()
@click.argument("name")
@click.option("--kind", "kinds", multiple=True, default=["estimator"], show_default=True,
              help="estimator, surrogate, allocator, refiner or backend; repeat the option for several components.")
def new(name: str, kinds: tuple[str, ...]) -> None:
    """Write a working plugin as a start: a folder impq-NAME, or a single file if NAME ends in .py."""
    from impq_core.skeleton import write_plugin

    written = write_plugin(name, kinds, Plugins())
    for path in written:
        click.echo(f"wrote {path}")
    if name.endswith(".py"):
        click.echo(f"use it: impq plugins --plugin ./{written[0]}")
    else:
        click.echo(f"use it: pip install -e './impq-{name}[test]' && pytest impq-{name} && impq plugins")


@click.group(invoke_without_command=True)
@click.pass_context
def cache(context: click.Context) -> None:
    """List the variants and scores in the cache; 'impq cache prune' deletes them."""
    from impq_core.model.cache import shelves
    from impq_core.model.demo import cache_folder
    from impq_core.terminal import make_console, shelves_table

    if context.invoked_subcommand:
        return
    kept = shelves()
    if not kept:
        click.echo(f"no variants in {cache_folder()}")
        return
    make_console().print(shelves_table(kept))


@cache.command()
@click.option("--older-than", type=float, metavar="DAYS", help="Only variants not used for this many days.")
@click.option("--model", help="Only variants of this model.")
@click.option("--all", "everything", is_flag=True, help="Delete without --model and --older-than.")
def prune(older_than: float | None, model: str | None, everything: bool) -> None:
    """Delete variants and their scores from the cache; they must meet every given condition."""
    import time

    from impq_core.model.cache import shelves

    if older_than is not None and not older_than >= 0:  # NaN is refused too
        raise UsageError(f"--older-than takes a number of days, not {older_than:g}")
    if older_than is None and model is None and not everything:
        raise UsageError("choose the variants to delete: --older-than DAYS, --model NAME or --all")
    freed = count = 0
    for shelf in shelves():
        unused = older_than is None or shelf.used < time.time() - 86400 * older_than
        if unused and model in (None, shelf.model):
            freed, count = freed + shelf.nbytes, count + 1
            shelf.remove()
    click.echo(f"deleted {count} shelves of variants, {freed / 1e6:.1f} MB")


@click.command()
@click.option("--tracking-uri", default="", help="MLflow store [MLFLOW_TRACKING_URI, or sqlite:///mlflow.db].")
@click.option("--runs", "output", default="impq-runs", help="Folder of run folders [impq-runs].")
@click.option("--fix", is_flag=True, help="Close orphaned MLflow runs; delete temporary files of dead processes.")
@plugin_option
def doctor(tracking_uri: str, output: str, fix: bool, plugin_files: tuple[Path, ...]) -> None:
    """Check plugins, libraries, the tracking store, run folders and the cache. Exit code 1 if something is wrong."""
    from impq_core.doctor import examine

    findings = examine(tracking_uri, Path(output), Plugins(plugin_files), fix)
    for finding in findings:
        click.echo(f"{finding.state:<6} {finding.what}")
    if any(finding.state == "wrong" for finding in findings):
        raise click.exceptions.Exit(1)


@click.command()
@click.option("--tracking-uri", default="", help="MLflow store [MLFLOW_TRACKING_URI, or sqlite:///mlflow.db].")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port to serve on.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve on.")
def ui(tracking_uri: str, port: int, host: str) -> None:
    """Serve the MLflow pages of a store until stopped."""
    from impq_core.tracking.pages import view_path
    from impq_core.tracking.store import check_store, experiments, sqlite_file, store_uri

    if tracking_uri == "none":
        raise UsageError("there are no pages without a store: --tracking-uri takes sqlite:///FILE or http(s)://HOST")
    uri = store_uri(tracking_uri)
    check_store(uri)
    if (file := sqlite_file(uri)) and not file.exists():
        raise ImpqError(f"there is no store {uri} yet: 'impq run' makes one")
    # One worker and no job runner suffice for one user, and start in a third of the time. The address is in the
    # environment because all users of a machine can see arguments, and the address may hold a password.
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                   "MLFLOW_BACKEND_STORE_URI": uri}
    click.echo(f"serving {without_secret(uri)} on http://{host}:{port} (Ctrl-C stops)")
    for name, number in experiments(uri).items():
        click.echo(f"runs of {name}: http://{host}:{port}{view_path(number)}")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port),
                               "--workers", "1"], environment)
