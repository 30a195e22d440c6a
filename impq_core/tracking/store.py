"""The MLflow store that runs are tracked in: which one is meant, whether it answers, what impq has in it."""

from __future__ import annotations

import os
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from impq_core.errors import ImpqError
from impq_core.runs.folder import RunFolder
from impq_core.tracking.pages import VIEW_TAG

FOLDER_TAG = "impq.folder"
"""Tag that says which run folder a run is kept in."""

CONNECT_SECONDS = 5.0
"""How long a tracking server may take to answer before a run is refused."""


def store_uri(uri: str) -> str:
    """The tracking URI meant: ``mlflow.db`` here by default, and SQLite files by their absolute path."""
    path = uri.removeprefix("sqlite:///") if uri else "mlflow.db"
    if not uri or uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(path).absolute()}"
    return uri


def check_store(uri: str) -> None:
    """Refuse a store that cannot be written or does not answer, without waiting for MLflow's many retries.

    Raises:
        ImpqError: the folder of a SQLite file is missing, a server does not answer, or the URI is of another kind.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ImpqError(f"tracking store '{uri}' is not understood: {error}") from error
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        folder = file.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ImpqError(f"tracking store {uri}: the folder {folder} is missing or cannot be written")
        if file.exists() and not _is_sqlite(file):
            raise ImpqError(f"tracking store {uri}: the file there is no SQLite database; give another --tracking-uri")
    elif parts.scheme in ("http", "https"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=CONNECT_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # it answers; what it answers is MLflow's business
        except (OSError, ValueError, HTTPException) as error:
            raise ImpqError(f"tracking server {uri} does not answer ({getattr(error, 'reason', error)}); "
                            "runs do without it with --tracking-uri none") from error
    elif parts.scheme not in ("postgresql", "mysql", "mssql", "databricks") and "+" not in parts.scheme:
        raise ImpqError(f"tracking store '{uri}' is not understood: give sqlite:///FILE, http(s)://HOST, or none")


def experiments(uri: str) -> dict[str, str]:
    """Ids, by name, of the experiments that impq has set up in a store; raises ImpqError where it cannot be read."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    try:
        with store_lock(uri):
            found = MlflowClient(uri).search_experiments()
    except Exception as error:  # MLflow, SQLAlchemy and the database's driver each raise their own
        raise ImpqError(f"tracking store {uri} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return {known.name: known.experiment_id for known in found if VIEW_TAG in known.tags}


def orphans(uri: str, close: bool = False) -> list[str]:
    """Names of the impq runs in a store that are RUNNING while nobody is at work in their folders.

    Args:
        uri: the store.
        close: end them as KILLED.

    Raises:
        ImpqError: the store cannot be read.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    found = []
    try:
        with store_lock(uri):
            client = MlflowClient(uri)
            ids = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(ids, "attributes.status = 'RUNNING'", max_results=1000)
        for run in runs:
            folder = run.data.tags.get(FOLDER_TAG)
            if folder is not None and not _at_work(Path(folder)):
                found.append(f"{Path(folder).name} ({run.info.run_id})")
                if close:
                    client.set_terminated(run.info.run_id, "KILLED")
    except Exception as error:  # MLflow, SQLAlchemy and the database's driver each raise their own
        raise ImpqError(f"tracking store {uri} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return found


def _at_work(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        with RunFolder(folder).locked():
            return False
    except ImpqError:
        return True


def _is_sqlite(file: Path) -> bool:
    """Whether a file is a SQLite database, or empty, which SQLite takes for one."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(16) in (b"", b"SQLite format 3\0")


def create_store(uri: str) -> None:
    """Make a SQLite store where there is none, whole or not at all; the lock must be held.

    MLflow builds it in dozens of steps, and cannot go on with one whose maker died in between.
    """
    if not uri.startswith("sqlite:") or (path := Path(uri.removeprefix("sqlite:///"))).exists():
        return
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as work:
        made = Path(work) / path.name
        MlflowClient(f"sqlite:///{made}").search_experiments()
        made.rename(path)


def store_lock(uri: str) -> FileLock:
    """SQLite stores are created by one process at a time: MLflow's own set-up fails when several race for it."""
    if uri.startswith("sqlite:"):
        return FileLock(uri.removeprefix("sqlite:///") + ".lock")
    return FileLock(Path(tempfile.gettempdir()) / "impq-tracking.lock")
