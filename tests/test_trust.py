"""No file can permit a model's code to run; only the command line can."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from own_code import model_with_code

from impq_core.cli import main
from impq_core.config import RunConfig, TextConfig, from_data, read_toml
from impq_core.errors import ImpqError, UsageError
from impq_core.exports.export import evaluate_folder, export_run
from impq_core.model.source import locate_model
from impq_core.runs.pipeline import play, resume, run
from impq_core.trust import Trust, without_permissions


@pytest.mark.parametrize("value", [True, 1, "yes"])
def test_a_permission_in_a_file_is_refused_with_the_flag_that_gives_it(value: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"impq\.json: trust_remote_code .*give --trust-remote-code"):
        from_data({"model": "x", "trust_remote_code": value}, "impq.json")
    (tmp_path / "impq.toml").write_text("trust_remote_code = true\n")
    with pytest.raises(UsageError, match="trust_remote_code"):
        read_toml(tmp_path / "impq.toml")


def test_a_permission_that_was_not_given_is_dropped() -> None:
    assert without_permissions({"model": "x", "trust_remote_code": False}, "a file") == {"model": "x"}


def test_no_configuration_can_hold_a_permission() -> None:
    assert not [name for name in vars(RunConfig()) if "trust" in name]


def test_code_of_a_model_runs_only_if_this_command_permits_it(
        texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setenv("IMPQ_TEST_CODE_RAN", str(ran))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = model_with_code(tmp_path / "model")
    config = RunConfig(model=str(model), backend="hqq", estimator="random", granularity="block", bits=(2, 4),
                       calibration=TextConfig(str(texts[0]), 4, 32), game_windows=2,
                       evaluation=TextConfig(str(texts[1]), 4, 32), dtype="float32", tracking_uri="none",
                       output=str(tmp_path / "runs"), cache=False)
    trusted = Trust(remote_code=True)
    made = run(config, trust=trusted)
    exported = export_run(made.folder, "hqq", tmp_path / "exported", trust=trusted)
    assert ran.exists() and (exported.folder / "modeling_own.py").exists()
    for file in (made.folder / "impq.toml", exported.folder / "impq.json"):
        assert "trust" not in file.read_text()
    ran.unlink()
    manifest = exported.folder / "impq.json"
    for attempt in (lambda: run(config), lambda: play(replace(config, estimator="spqe")), lambda: resume(made.folder),
                    lambda: export_run(made.folder, "hqq", tmp_path / "again"),
                    lambda: evaluate_folder(exported.folder)):
        with pytest.raises(ImpqError, match="--trust-remote-code"):
            attempt()
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "run": {**data["run"], "trust_remote_code": True}}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "impq.toml").write_text(config.to_toml() + "\n")
    (tmp_path / "impq.toml").write_text("trust_remote_code = true\n" + config.to_toml())
    for command in (["evaluate", str(exported.folder)], ["run"], ["run", "--resume", str(made.folder)],
                    ["export", str(made.folder), "hqq", "--to", "once-more"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code in (1, 2) and "--trust-remote-code" in capsys.readouterr().err
    assert not ran.exists()
    manifest.write_text(json.dumps(data))
    again = evaluate_folder(exported.folder, trust=trusted)
    assert again.score is not None and exported.score is not None and again.score.nll == exported.score.nll


def test_the_digest_of_a_model_covers_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPQ_TEST_CODE_RAN", str(tmp_path / "ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = model_with_code(tmp_path / "model")
    before = locate_model(str(folder)).digest
    code = folder / "modeling_own.py"
    code.write_text(code.read_text() + "\n# another version\n")
    assert locate_model(str(folder)).digest != before
