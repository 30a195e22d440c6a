"""The MLflow store that runs are tracked in: its address, whether it answers, and its impq runs."""

from __future__ import annotations

import base64
import os
import platform
import ssl
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from impq_core.credentials import split_credentials, without_secret
from impq_core.errors import ImpqError
from impq_core.files import scratch_folder
from impq_core.model.demo import cache_folder
from impq_core.runs.folder import RunFolder
from impq_core.tracking.pages import VIEW_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER_TAG = "impq.folder"
"""Tag with the path of a run's folder."""

HOST_TAG = "impq.host"
"""Tag with the name of the machine that the folder is on."""

DEFAULT_EXPERIMENT = "impq"

CONNECT_SECONDS = 5.0
"""Time that a tracking server may take to answer before a run is refused."""

SQLITE = "sqlite:///"


def store_uri(uri: str) -> str:
    """The tracking URI to use.

    Args:
        uri: as configured; empty for ``MLFLOW_TRACKING_URI``, or for ``mlflow.db`` in the working folder if that is
            not set.

    Returns:
        The URI: SQLite files by their absolute path, and with the password of ``MLFLOW_TRACKING_URI`` if that is the
        same store, because impq.toml holds no passwords.
    """
    environment = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri or uri == without_secret(environment):
        uri = environment or f"{SQLITE}mlflow.db"
    file = sqlite_file(uri)
    return f"{SQLITE}{file.absolute()}" if file else uri


def experiment_name(name: str) -> str:
    """The MLflow experiment: as configured, else ``MLFLOW_EXPERIMENT_NAME``, else ``impq``."""
    return name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for other stores."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def check_store(uri: str) -> None:
    """Refuse a store that cannot be written or does not answer, without waiting for MLflow's many retries.

    Raises:
        ImpqError: the folder of a SQLite file is missing, a server does not answer or refuses the credentials, or the
            URI is of another kind.
    """
    shown = without_secret(uri)
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:  # its text may quote the password
        raise ImpqError(f"tracking store '{shown}' is not understood: its host or port is wrong, or its password has a "
                        "character that must be percent-encoded") from error
    file = sqlite_file(uri)
    if file:
        if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise ImpqError(f"tracking store {uri}: the folder {file.parent} is missing or cannot be written")
        if file.exists() and not _is_sqlite(file):
            raise ImpqError(f"tracking store {uri}: the file there is no SQLite database; give another --tracking-uri")
    elif parts.scheme in ("http", "https"):
        _check_server(uri)
    elif uri != "databricks" and parts.scheme not in (
            "postgresql", "mysql", "mssql", "databricks") and "+" not in parts.scheme:
        origin = " (from MLFLOW_TRACKING_URI)" if uri == os.environ.get("MLFLOW_TRACKING_URI") else ""
        raise ImpqError(f"tracking store '{shown}'{origin} is not understood: give sqlite:///FILE, http(s)://HOST, or "
                        "none")


def _check_server(uri: str) -> None:
    shown = without_secret(uri)
    address = split_credentials(uri)
    user = address.user or os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = address.password or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    request = urllib.request.Request(f"{address.uri.rstrip('/')}/health")
    if user:
        request.add_header("Authorization", f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}")
    elif token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS, context=_tls()).close()
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise ImpqError(f"tracking server {shown} refuses access: set MLFLOW_TRACKING_USERNAME and "
                            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN") from error
        # Any other answer shows that the server runs; MLflow reports what it refuses.
    except (OSError, ValueError, HTTPException) as error:
        raise ImpqError(f"tracking server {shown} does not answer "
                        f"({without_secret(str(getattr(error, 'reason', error)))}); runs do without it with "
                        "--tracking-uri none") from error


def _tls() -> ssl.SSLContext:
    """TLS settings from the variables that MLflow reads."""
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
        context.load_cert_chain(certificate)
    return context


def connect(uri: str) -> MlflowClient:
    """MLflow's client of a store. Credentials in an http address are handed to MLflow in the environment variables it
    reads them from, so that no message, tag or file of MLflow repeats them."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    if not uri.startswith(("http://", "https://")):
        return MlflowClient(uri)
    address = split_credentials(uri)
    if address.user:
        os.environ["MLFLOW_TRACKING_USERNAME"] = address.user
        os.environ["MLFLOW_TRACKING_PASSWORD"] = address.password
    return MlflowClient(address.uri)


def reason(error: BaseException) -> str:
    """The text of an error as part of a line, without passwords."""
    return without_secret(" ".join(str(error).split()))[:200]


def experiments(uri: str) -> dict[str, str]:
    """Ids, by name, of the experiments that impq has set up in a store; raises ImpqError if it cannot be read."""
    try:
        with store_lock(uri):
            entries = connect(uri).search_experiments()
    except Exception as error:  # MLflow, SQLAlchemy and the database's driver each raise their own
        raise ImpqError(f"tracking store {without_secret(uri)} cannot be read: {reason(error)}") from error
    return {entry.name: entry.experiment_id for entry in entries if VIEW_TAG in entry.tags}


def orphans(uri: str, close: bool = False) -> list[str]:
    """Names of the impq runs of this machine that are RUNNING in a store while no process is at work in their folders.

    Args:
        uri: the store.
        close: end them as KILLED.

    Raises:
        ImpqError: the store cannot be read.
    """
    names = []
    try:
        with store_lock(uri):
            client = connect(uri)
            ids = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(ids, "attributes.status = 'RUNNING'", max_results=1000)
        for run in runs:
            folder = run.data.tags.get(FOLDER_TAG)
            # Runs of version 0.1 have no host: on a server they may be at work on another machine.
            host = run.data.tags.get(HOST_TAG, platform.node() if sqlite_file(uri) else "")
            if folder is not None and host == platform.node() and not _at_work(Path(folder)):
                names.append(f"{Path(folder).name} ({run.info.run_id})")
                if close:
                    client.set_terminated(run.info.run_id, "KILLED")
    except Exception as error:  # MLflow, SQLAlchemy and the database's driver each raise their own
        raise ImpqError(f"tracking store {without_secret(uri)} cannot be read: {reason(error)}") from error
    return names


def _at_work(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        with RunFolder(folder).locked():
            return False
    except ImpqError:
        return True


def _is_sqlite(file: Path) -> bool:
    """Whether a file is a SQLite database, or empty, which SQLite accepts as one."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(16) in (b"", b"SQLite format 3\0")


def create_store(uri: str) -> None:
    """Make a SQLite store if there is none, whole or not at all; the lock must be held.

    MLflow builds it in dozens of steps, and cannot continue one whose process died in between.
    """
    path = sqlite_file(uri)
    if path is None or path.exists():
        return
    with scratch_folder(path.parent, path.name) as scratch:
        made = scratch / path.name
        connect(f"{SQLITE}{made}").search_experiments()
        made.rename(path)


def store_lock(uri: str) -> FileLock:
    """Lock for the set-up of a store and of its experiments: MLflow's own fails if several processes race for it.

    Beside a SQLite file; in the user's cache for other stores, because a lock in a folder that several users share
    belongs to its first user. Raises ImpqError if the cache folder cannot be made.
    """
    path = sqlite_file(uri)
    return FileLock(f"{path}.lock" if path else cache_folder() / "tracking.lock")
