"""Commands for the installation, the cache and the tracking store: plugins, cache, doctor, ui."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from impq_core.commands.common import plugin_option
from impq_core.commands.output import Answer, answers
from impq_core.credentials import without_secret
from impq_core.errors import ImpqError, UsageError
from impq_core.plugins import OFFERED, Plugins


@click.group(invoke_without_command=True)
@click.option("--options", "show_options", is_flag=True, help="List the options of every component.")
@plugin_option
@answers
@click.pass_context
def plugins(context: click.Context, show_options: bool, plugin_files: tuple[Path, ...]) -> Answer | None:
    """List the components of all plugins, and the plugins that cannot be used; 'impq plugins new' writes one."""
    from impq_core.descriptions import described_options
    from impq_core.documents.installation import ComponentDocument, DroppedDocument, OptionDocument, PluginsDocument

    if context.invoked_subcommand:
        return None
    components = []
    installed = Plugins(plugin_files)
    width = max(len(name) for _, name in installed.offers)
    for role in OFFERED:
        click.echo(f"{role}s")
        for name in installed.names(role):
            component = installed.find(role, name)
            origin = installed.offers[role, name].origin
            remedy = component.remedy() if component.missing() else None
            click.echo(f"  {name:<{width}} {component.summary}  ({origin})" + (f"  [{remedy}]" if remedy else ""))
            options = described_options(installed, role, name) if show_options else []
            for option, default, description in options:
                click.echo(f"      {option}={default}  {description}".rstrip())
            components.append(ComponentDocument(role, name, component.summary, origin, remedy,
                                                [OptionDocument(*option) for option in options]))
    if installed.dropped:
        click.echo("not used")
        for dropped in installed.dropped:
            click.echo(f"  {dropped.name}: {dropped.reason}")
    dropped_ones = [DroppedDocument(each.name, each.reason) for each in installed.dropped]
    return Answer(PluginsDocument(components, dropped_ones), [f"{each.role} {each.name}" for each in components])


@plugins.command()
@click.argument("name")
@click.option("--kind", "kinds", multiple=True, default=["estimator"], show_default=True,
              help="estimator, surrogate, allocator, refiner or backend; repeat the option for several components.")
@answers
def new(name: str, kinds: tuple[str, ...]) -> Answer:
    """Write a working plugin as a start: a folder impq-NAME, or a single file if NAME ends in .py."""
    from impq_core.documents.installation import WrittenDocument
    from impq_core.skeleton import write_plugin

    written = write_plugin(name, kinds, Plugins())
    for path in written:
        click.echo(f"wrote {path}")
    if name.endswith(".py"):
        click.echo(f"use it: impq plugins --plugin ./{written[0]}")
    else:
        click.echo(f"use it: pip install -e './impq-{name}[test]' && pytest impq-{name} && impq plugins")
    return Answer(WrittenDocument([str(path) for path in written]), [str(path) for path in written])


@click.group(invoke_without_command=True)
@answers
@click.pass_context
def cache(context: click.Context) -> Answer | None:
    """List the variants and scores in the cache; 'impq cache prune' deletes them."""
    from impq_core.documents.installation import CacheDocument, ShelfDocument
    from impq_core.model.cache import shelves
    from impq_core.model.demo import cache_folder
    from impq_core.terminal import make_console, shelves_table

    if context.invoked_subcommand:
        return None
    kept = shelves()
    if kept:
        make_console().print(shelves_table(kept))
    else:
        click.echo(f"no variants in {cache_folder()}")
    documents = [ShelfDocument(str(shelf.folder), shelf.model, str(shelf.about.get("backend")).split(".")[0],
                               {key: str(value) for key, value in shelf.about.get("options", {}).items()}, shelf.count,
                               shelf.facts, shelf.nbytes, shelf.used) for shelf in kept]
    return Answer(CacheDocument(str(cache_folder()), documents),
                  [f"{len(kept)} shelves of variants, {sum(shelf.nbytes for shelf in kept) / 1e6:.1f} MB"])


@cache.command()
@click.option("--older-than", type=float, metavar="DAYS", help="Only variants not used for this many days.")
@click.option("--model", help="Only variants of this model.")
@click.option("--all", "everything", is_flag=True, help="Delete without --model and --older-than.")
@answers
def prune(older_than: float | None, model: str | None, everything: bool) -> Answer:
    """Delete variants and their scores from the cache; they must meet every given condition."""
    import time

    from impq_core.documents.installation import PrunedDocument
    from impq_core.model.cache import shelves

    if older_than is not None and not older_than >= 0:  # NaN is refused too
        raise UsageError(f"--older-than takes a number of days, not {older_than:g}")
    if older_than is None and model is None and not everything:
        raise UsageError("choose the variants to delete: --older-than DAYS, --model NAME or --all")
    freed, folders = 0, []
    for shelf in shelves():
        unused = older_than is None or shelf.used < time.time() - 86400 * older_than
        if unused and model in (None, shelf.model):
            freed += shelf.nbytes
            folders.append(str(shelf.folder))
            shelf.remove()
    line = f"deleted {len(folders)} shelves of variants, {freed / 1e6:.1f} MB"
    click.echo(line)
    return Answer(PrunedDocument(folders, freed), [line])


@click.command()
@click.option("--tracking-uri", default="", help="MLflow store [MLFLOW_TRACKING_URI, or sqlite:///mlflow.db].")
@click.option("--runs", "output", default="impq-runs", help="Folder of run folders [impq-runs].")
@click.option("--fix", is_flag=True, help="Close orphaned MLflow runs; delete temporary files of dead processes.")
@plugin_option
@answers
def doctor(tracking_uri: str, output: str, fix: bool, plugin_files: tuple[Path, ...]) -> Answer:
    """Check plugins, libraries, the tracking store, run folders and the cache. Exit code 1 if something is wrong."""
    from impq_core.doctor import examine
    from impq_core.documents.installation import DoctorDocument, FindingDocument

    findings = examine(tracking_uri, Path(output), Plugins(plugin_files), fix)
    for finding in findings:
        click.echo(f"{finding.state:<6} {finding.what}")
    wrong = [finding for finding in findings if finding.state == "wrong"]
    return Answer(DoctorDocument(not wrong, [FindingDocument(finding.state, finding.what) for finding in findings]),
                  [f"{finding.state:<6} {finding.what}" for finding in wrong], int(bool(wrong)))


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
