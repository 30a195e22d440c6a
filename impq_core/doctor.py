"""What may be wrong on a machine, looked for one thing after another."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from impq_core.errors import ImpqError
from impq_core.keys import versions
from impq_core.model.cache import shelves
from impq_core.model.demo import cache_folder
from impq_core.plugins import OFFERED, Plugins
from impq_core.runs.folder import RunFolder

LEAST_FREE = 2e9
"""Bytes of free disk below which a run is likely to fail."""

UNFINISHED_SECONDS = 3600.0
"""A temporary file of this age belongs to a process that died."""


@dataclass(frozen=True)
class Finding:
    """Something seen: ``ok``, a ``note`` that asks for nothing, ``wrong``, or ``fixed``."""

    state: Literal["ok", "note", "wrong", "fixed"]
    what: str


def examine(tracking_uri: str, output: Path, plugins: Plugins, fix: bool = False) -> list[Finding]:
    """Look at everything.

    Args:
        tracking_uri: MLflow store; empty for ``mlflow.db`` here, ``none`` for none.
        output: folder of run folders.
        plugins: those found.
        fix: mend what loses nothing: close orphaned MLflow runs, delete what dead processes left and variants that no
            run can use any more.
    """
    return [*_software(plugins), *_store(tracking_uri, fix), *_runs(output, fix), *_cache(fix)]


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
                yield Finding("wrong", f"{role} '{name}' points to {component.target}, which is not there")


def _store(tracking_uri: str, fix: bool) -> Iterator[Finding]:
    from impq_core.tracking.store import check_store, orphans, store_uri

    if tracking_uri == "none":
        return
    uri = store_uri(tracking_uri)
    if uri.startswith("sqlite:"):
        file = Path(uri.removeprefix("sqlite:///"))
        yield from (_leftover(path, fix) for path in sorted(file.parent.glob(f".{file.name}.*")) if _old(path))
    try:
        check_store(uri)
        if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
            yield Finding("note", f"no store {uri} yet: 'impq run' makes one")
            return
        found = orphans(uri, close=fix)
    except ImpqError as error:
        yield Finding("wrong", str(error))
        return
    yield Finding("ok", f"tracking store {uri}")
    for name in found:
        yield Finding("fixed" if fix else "wrong", f"MLflow run {name} is RUNNING, and nobody works on it"
                      + (": closed as KILLED" if fix else " (--fix closes it)"))


def _runs(output: Path, fix: bool) -> Iterator[Finding]:
    if not output.is_dir():
        return
    for path in sorted(output.iterdir()):
        if path.name.startswith(".") and path.is_dir() and _old(path):
            yield _leftover(path, fix)
        elif (path / "provenance.json").is_file() and not (path / "evaluation.json").is_file():
            try:
                with RunFolder(path).locked():
                    told = "has an estimate and no plan" if (path / "estimate.npz").exists() else "ended early"
                    yield Finding("note", f"{path} {told}: impq run --resume {path} goes on")
            except ImpqError:
                yield Finding("note", f"{path} is at work")


def _cache(fix: bool) -> Iterator[Finding]:
    try:
        folder = cache_folder()
        probe = folder / f".probe{time.time_ns()}"
        probe.touch()
        probe.unlink()
        found = shelves()
    except (ImpqError, OSError) as error:
        yield Finding("wrong", f"the cache cannot be written: {error}")
        return
    free = shutil.disk_usage(folder).free
    yield Finding("ok", f"cache {folder}: {len(found)} shelves of variants, "
                        f"{sum(shelf.nbytes for shelf in found) / 1e6:.0f} MB")
    if free < LEAST_FREE:
        yield Finding("wrong", f"only {free / 1e6:.0f} MB are free on the disk of {folder}")
    for shelf in found:
        backend = str(shelf.about.get("backend", "")).split(".")[0]
        stale = not backend
        if stale and fix:
            freed = shelf.nbytes
            shelf.remove()
            yield Finding("fixed", f"variants of {shelf.about.get('model')} made by other code deleted, "
                                   f"{freed / 1e6:.0f} MB")
        elif stale:
            yield Finding("note", f"{shelf.folder}: variants of {shelf.about.get('model')} made by other code, which "
                                   "nothing uses any more (--fix deletes them)")
        else:
            yield from (_leftover(file, fix) for file in sorted(shelf.folder.glob(".*")) if _old(file))
    for place in ("models", "texts"):
        yield from (_leftover(path, fix) for path in sorted((folder / place).glob("tmp*")) if _old(path))


def _leftover(path: Path, fix: bool) -> Finding:
    if not fix:
        return Finding("wrong", f"{path} was left by a process that died (--fix deletes it)")
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return Finding("fixed", f"{path}, left by a process that died, deleted")


def _old(path: Path) -> bool:
    return path.stat().st_mtime < time.time() - UNFINISHED_SECONDS
