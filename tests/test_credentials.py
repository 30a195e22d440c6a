"""Passwords in addresses, and the environment variables of MLflow's store and credentials."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from impq_core.cli import cli
from impq_core.config import RunConfig
from impq_core.credentials import split_credentials, without_secret
from impq_core.errors import ImpqError
from impq_core.exports.export import export_run
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import run
from impq_core.runs.sweep import Sweep, run_sweep
from impq_core.tracking.pages import run_params
from impq_core.tracking.store import check_store, experiment_name, store_uri
from impq_core.tracking.tracker import Tracker

SECRET = "hunter2"


@pytest.mark.parametrize("uri, shown", [
    ("http://me:hunter2@host:5000/path", "http://host:5000/path"), ("https://hunter2@host", "https://host"),
    ("postgresql+psycopg2://me:hunter2@db/x", "postgresql+psycopg2://me@db/x"),
    ("mysql://me:hun@ter2@db:3306/x?ssl=1", "mysql://me@db:3306/x?ssl=1"),
    ("http://me:hunter2/x@host/y", "http://host/y"), ("postgresql://:hunter2@db/x", "postgresql://db/x"),
    ("postgresql://db/x?user=me&password=hunter2&ssl=1", "postgresql://db/x?user=me&ssl=1"),
    ("postgresql://db/x?password=hunter2", "postgresql://db/x"),
    ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b"), ("http://host:5000/a@b", "http://host:5000/a@b"),
    ("sqlite:////home/a@b/it's here/mlflow.db", "sqlite:////home/a@b/it's here/mlflow.db"), ("none", "none"), ("", ""),
    ("no answer from http://me:hunter2@host/api (refused)", "no answer from http://host/api (refused)")])
def test_passwords_are_taken_out_of_addresses(uri: str, shown: str) -> None:
    assert without_secret(uri) == shown and without_secret(shown) == shown


@given(st.text(min_size=1), st.text(min_size=1), st.sampled_from(["http", "https", "postgresql", "mysql+pymysql"]))
def test_no_password_survives(user: str, password: str, scheme: str) -> None:
    uri = f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@host:1/db"
    expected = "host:1/db" if scheme.startswith("http") else f"{quote(user, safe='')}@host:1/db"
    assert without_secret(uri) == f"{scheme}://{expected}"
    assert split_credentials(uri) == (f"{scheme}://host:1/db", user, password)


def test_no_file_of_a_run_holds_a_password(tiny_config: RunConfig, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # artifacts of a store that is no file go to the working folder
    uri = f"postgresql://me:{SECRET}@db/x"
    monkeypatch.setattr("impq_core.tracking.tracker.check_store", lambda uri: None)
    monkeypatch.setattr("impq_core.tracking.tracker.connect", lambda uri: MlflowClient(tiny_config.tracking_uri))
    config = replace(tiny_config, tracking_uri=uri)
    plugins = Plugins()
    plugins.watch(Tracker(uri, ""))
    folder = run(config, plugins).folder
    export_run(folder, "recipe-auto-round", tmp_path / "exported", plugins)
    run_sweep(Sweep(replace(config, estimator="zscore", options={}), {"budget": ["3bits"]}), plugins)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert json.loads((folder / "mlflow.json").read_text())["uri"] == "postgresql://me@db/x"
    assert f"tracking_uri = {chr(34)}postgresql://me@db/x{chr(34)}" in (folder / "impq.toml").read_text()
    assert dict(run_params(config))["tracking_uri"] == "postgresql://me@db/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store_uri("postgresql://me@db/x") == uri  # so that a run is resumed and exported with its password


@contextmanager
def server(status: int) -> Iterator[tuple[str, list[str | None]]]:
    """An HTTP server's host and port, and the Authorization headers it got."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(status)
            self.end_headers()

        def log_message(self, *rest: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{listening.server_port}", seen
    finally:
        listening.shutdown()
        listening.server_close()


def test_credentials_are_sent_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def basic(text: str) -> str:
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    with server(200) as (host, seen):
        check_store(f"http://me:hunter2%21@{host}")
        check_store(f"http://{host}")
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
        check_store(f"http://{host}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "you")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "there")
        check_store(f"http://{host}")
    assert seen == [basic("me:hunter2!"), None, "Bearer abc", basic("you:there")]
    with server(401) as (host, _), pytest.raises(ImpqError, match="set MLFLOW_TRACKING_USERNAME") as error:
        check_store(f"http://me:{SECRET}@{host}")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("uri", [f"http://me:{SECRET}@127.0.0.1:9", f"http://me:{SECRET}/x@127.0.0.1:9",
                                 f"ftp://me:{SECRET}@host", f"http://me@host:{SECRET}@:x"])
def test_no_message_holds_a_password(uri: str) -> None:
    with pytest.raises(ImpqError) as error:
        check_store(uri)
    assert SECRET not in str(error.value)
    answer = CliRunner().invoke(cli, ["doctor", "--tracking-uri", uri])
    assert answer.exit_code == 1 and SECRET not in answer.output


def test_the_environment_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store_uri("") == f"sqlite:///{tmp_path}/mlflow.db" and experiment_name("") == "impq"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    assert store_uri("") == f"sqlite:///{tmp_path}/other.db" and experiment_name("") == "ours"
    assert store_uri("sqlite:///mine.db") == f"sqlite:///{tmp_path}/mine.db" and experiment_name("mine") == "mine"
    assert store_uri("http://me:secret@host") == "http://me:secret@host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ImpqError, match=r"from MLFLOW_TRACKING_URI"):
        check_store(store_uri(""))


def test_unwritable_temporary_folders_stop_nobody(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from impq_core.tracking.store import store_lock

    path = Path(store_lock("http://host").lock_file)
    assert path.parent == cache
    assert store_lock("sqlite:////a/b.db").lock_file == "/a/b.db.lock"
