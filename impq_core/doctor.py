"""Checks of an installation: plugins, libraries, the tracking store, run folders and the cache."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import Timeout

from impq_core.credentials import without_secret
from impq_core.errors import ImpqError
from impq_core.files import abandoned, discard
from impq_core.keys import versions
from impq_core.machine import free_device_memory, free_disk, free_memory
from impq_core.model.cache import shelves
from impq_core.model.demo import cache_folder
from impq_core.model.device import devices_there, hardware
from impq_core.plugins import OFFERED, Plugins
from impq_core.runs.folder import CHILDREN, RunFolder

LEAST_FREE = 2e9
"""Bytes of free disk below which a run is likely to fail."""

UNUSED_DAYS = 30
"""Variants that were not used for so many days are reported."""


@dataclass(frozen=True)
class Finding:
    """A line of the report: ``ok``, a ``note`` that needs no action, ``wrong``, or ``fixed``."""

    state: Literal["ok", "note", "wrong", "fixed"]
    what: str


def examine(tracking_uri: str, output: Path, plugins: Plugins, fix: bool = False) -> list[Finding]:
    """Run all checks.

    Args:
        tracking_uri: MLflow store; empty for the default one, ``none`` for none.
        output: folder of run folders.
        plugins: the plugins to check.
        fix: end orphaned MLflow runs as KILLED, and delete temporary files and folders of processes that died. Only
            files and folders that impq made and marked are deleted.
    """
    return [*_software(plugins), _machine(output), _devices(), *_crews(plugins), *_store(tracking_uri, fix),
            *_runs(output, fix), *_cache(fix)]


def _software(plugins: Plugins) -> Iterator[Finding]:
    yield Finding("ok", ", ".join(f"{name} {version}" for name, version in versions(["mlflow"]).items()))
    for dropped in plugins.dropped:
        yield Finding("wrong", f"plugin {dropped.name} is not used: {dropped.reason}")
    for role in OFFERED:
        for name in plugins.names(role):
            component = plugins.find(role, name)
            if component.missing():
                yield Finding("note", f"{role} '{name}' {component.remedy()}")
            elif importlib.util.find_spec(component.target.split(":")[0].split(".")[0]) is None:
                yield Finding("wrong", f"{role} '{name}' points to {component.target}, which does not exist")


def _machine(output: Path) -> Finding:
    memory = free_memory()
    known = "an unknown amount" if memory is None else f"{memory / 1e9:.1f} GB"
    return Finding("ok", f"free: {known} of memory, {free_disk(output) / 1e9:.1f} GB of disk for {output} (what a run "
                         "takes: impq run --dry-run)")


def _devices() -> Finding:
    found = devices_there()[1:]
    if not found:
        return Finding("ok", "devices: cpu; torch can use no accelerator here")
    shown = []
    for device in found:
        free = free_device_memory(device)
        known = "an unknown amount" if free is None else f"{free / 1e9:.1f} GB"
        shown.append(f"{device} ({hardware(device)}, {known} of memory free)")
    return Finding("ok", f"devices: cpu, {', '.join(shown)}")


def _crews(plugins: Plugins) -> Iterator[Finding]:
    """The crews that --workers can take; those without their libraries are reported as components."""
    for name in plugins.names("crew"):
        component = plugins.find("crew", name)
        if not component.missing():
            libraries = ", ".join(f"{library} {version}" for library, version in versions(component.needs).items()
                                  if library in component.needs)
            yield Finding("ok", f"workers: crew {name}" + (f" ({libraries})" if libraries else "")
                          + f"; {os.cpu_count()} cores here")


def _store(tracking_uri: str, fix: bool) -> Iterator[Finding]:
    from impq_core.tracking.store import check_store, orphans, sqlite_file, store_uri

    if tracking_uri == "none":
        return
    uri = store_uri(tracking_uri)
    file = sqlite_file(uri)
    if file:
        yield from _leftovers(file.parent, fix)
    try:
        check_store(uri)
        if file and not file.exists():
            yield Finding("note", f"no store {uri} yet: 'impq run' makes one")
            return
        names = orphans(uri, close=fix)
    except ImpqError as error:
        yield Finding("wrong", str(error))
        return
    yield Finding("ok", f"tracking store {without_secret(uri)}")
    for name in names:
        yield Finding("fixed" if fix else "wrong", f"MLflow run {name} is RUNNING, but no process is at work in it"
                      + (": closed as KILLED" if fix else " (--fix closes it)"))


def _runs(output: Path, fix: bool) -> Iterator[Finding]:
    if not output.is_dir():
        return
    yield from _leftovers(output, fix)
    for path in sorted(output.iterdir()):
        if path.is_symlink() or not (path / "impq.toml").is_file():
            continue
        for folder in (path, path / CHILDREN, *sorted((path / CHILDREN).glob("*/"))):
            yield from _leftovers(folder, fix)
        if (path / "provenance.json").is_file() and not (path / "evaluation.json").is_file():
            try:
                with RunFolder(path).locked():
                    state = "has an estimate and no plan" if (path / "estimate.npz").exists() else "ended early"
                    yield Finding("note", f"{path} {state}: impq run --resume {path} goes on")
            except ImpqError:
                yield Finding("note", f"{path} is at work")


def _cache(fix: bool) -> Iterator[Finding]:
    try:
        folder = cache_folder()
        probe = folder / f".probe{time.time_ns()}"
        probe.touch()
        probe.unlink()
        kept = shelves()
    except (ImpqError, OSError) as error:
        yield Finding("wrong", f"the cache cannot be written: {error}")
        return
    yield Finding("ok", f"cache {folder}: {len(kept)} shelves of variants, "
                        f"{sum(shelf.nbytes for shelf in kept) / 1e6:.0f} MB")
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        yield Finding("wrong", f"only {free / 1e6:.0f} MB are free on the disk of {folder}")
    if unused := [shelf for shelf in kept if shelf.used < time.time() - 86400 * UNUSED_DAYS]:
        yield Finding("note", f"{len(unused)} shelves of variants, {sum(s.nbytes for s in unused) / 1e6:.0f} MB, were "
                              f"not used for {UNUSED_DAYS} days: impq cache prune --older-than {UNUSED_DAYS}")
    for place in (*(shelf.folder for shelf in kept), folder / "models", folder / "texts"):
        yield from _leftovers(place, fix)


def _leftovers(folder: Path, fix: bool) -> Iterator[Finding]:
    for path in abandoned(folder):
        if not fix:
            yield Finding("wrong", f"{path} was left by a process that died (--fix deletes it)")
            continue
        try:
            discard(path)
        except (OSError, Timeout) as error:
            yield Finding("wrong", f"{path}, left by a process that died, cannot be deleted: {error}")
        else:
            yield Finding("fixed", f"{path}, left by a process that died, deleted")
