"""Records of runs, sweeps and exports in MLflow."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impq_core.config import RunConfig
from impq_core.exports.export import export_run
from impq_core.plugins import Plugins
from impq_core.results import RunResult
from impq_core.runs.folder import RunFolder
from impq_core.runs.pipeline import resume, run
from impq_core.runs.sweep import Sweep, run_sweep
from impq_core.testing import planted_space
from impq_core.tracking.figures import draw_figures
from impq_core.tracking.logged_model import ExportTracker
from impq_core.tracking.pages import COLUMNS, VIEW_TAG, experiment_tags, run_name, run_params, shortened, sweep_name
from impq_core.tracking.store import experiments
from impq_core.tracking.tracker import LONGEST_PARAM, Tracker


def watched(config: RunConfig) -> Plugins:
    plugins = Plugins()
    plugins.watch(Tracker(config.tracking_uri, config.experiment))
    plugins.watch(ExportTracker())
    return plugins


def exported(result: RunResult, name: str, target: Path) -> None:
    plugins = Plugins()
    plugins.watch(ExportTracker())
    export_run(str(result.folder), name, target, plugins)


def test_names_tell_what_a_run_is(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, budget="3bits")
    assert run_name(config) == "spqe auto qp gptq 3bits"
    assert run_name(config, fitted=False) == "spqe qp gptq 3bits"
    assert run_name(replace(config, estimate_with="quanto", refine=9)) == "spqe(quanto) auto qp+swaps gptq 3bits"
    assert run_name(replace(config, plan="x/plan.json")) == "given plan, gptq"
    assert sweep_name({"estimator": ["spqe", "hawq"], "budget": ["3bits"]}) == "sweep: 2 estimators"
    assert sweep_name({}) == "sweep"
    assert shortened("a line\n" * 999).endswith("a line") and len(shortened("a line\n" * 999)) <= 5000
    assert max(map(len, experiment_tags().values())) <= 5000


NAMES = st.from_regex(r"[a-zA-Z_]\w{0,40}", fullmatch=True)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
VALUES = TEXTS | st.integers() | st.floats() | st.booleans()


@settings(deadline=None)  # the first example imports MLflow
@given(st.dictionaries(TEXTS, st.floats(0.1, 16), max_size=150), st.lists(TEXTS),
       st.dictionaries(st.sampled_from(["estimator", "backend"]), st.dictionaries(NAMES, VALUES)), TEXTS.filter(bool))
def test_mlflow_accepts_the_parameters_of_any_configuration(
        pins: dict[str, float], exclude: list[str], options: dict[str, dict[str, object]], name: str) -> None:
    from mlflow.utils.validation import _validate_param

    config = RunConfig(model=name, budget=name, experiment=name, pins=pins, exclude=tuple(exclude), options=options)
    params = dict(run_params(config))
    for key, value in params.items():
        _validate_param(key, str(value)[:LONGEST_PARAM])


PLACES = ("it's here", "two ' and ''", 'a "quoted" one', "back`tick", "100% of % it", "人")


def test_a_run_is_one_mlflow_run_wherever_it_is(tiny_config: RunConfig, tmp_path: Path) -> None:
    for place in PLACES:
        follow_one_folder(tiny_config, tmp_path, place)


def follow_one_folder(tiny_config: RunConfig, tmp_path: Path, place: str) -> None:
    from mlflow import MlflowClient

    config = replace(tiny_config, output=str(tmp_path / place / "runs"), exclude=("model.layers.0*",),
                     pins={"model.layers.1*": 4, "*[x]' = ~": 4})
    space = planted_space(3)
    folder = RunFolder.create(Path(config.output), {"impq.toml": config.to_toml()})

    def track(path: RunFolder, end: BaseException) -> str:
        tracker = Tracker(config.tracking_uri, "")
        tracker.impq_run_started(config, space, path.path)
        run_id = tracker.run_id
        tracker.impq_run_failed(end)
        return run_id

    first = track(folder, KeyboardInterrupt())
    assert track(folder, ValueError("x")) == first
    folder.tracking.unlink()  # killed before the file was written
    assert track(folder, ValueError("y")) == first
    client = MlflowClient(config.tracking_uri)
    assert client.get_run(first).info.status == "FAILED"
    assert client.get_run(first).data.params["pins"] == "model.layers.1*=4, *[x]' = ~=4"

    copied = shutil.copytree(folder.path, tmp_path / place / "copied")
    second = track(RunFolder(copied), ValueError("z"))
    assert second != first  # a copy of a folder is another run
    shutil.rmtree(folder.path)
    moved = copied.rename(tmp_path / place / "moved")
    assert track(RunFolder(moved), ValueError("z")) == second


def test_a_run_and_its_exports_in_mlflow(tiny_config: RunConfig, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    result = run(tiny_config, watched(tiny_config))
    client = MlflowClient(tiny_config.tracking_uri)
    [(name, number)] = experiments(tiny_config.tracking_uri).items()
    assert name == "impq"
    view = json.loads(client.get_experiment(number).tags[VIEW_TAG])
    assert json.loads(view["state"])["selectedColumns"] == list(COLUMNS)
    [kept] = client.search_runs([number])
    assert kept.info.run_name == "spqe auto qp gptq 3bits"
    for column in COLUMNS:
        kind, _, key = column.partition(".")
        assert kind == "attributes" or key.strip("`") in getattr(kept.data, kind), column
    assert kept.data.tags["impq.folder"] == str(result.folder)
    assert "| uniform 3 |" in kept.data.tags["mlflow.note.content"]
    assert f"NLL {result.evaluation.plan.nll:.4f}" in kept.data.tags["mlflow.note.content"]
    assert sorted((i.dataset.name, i.tags[0].value) for i in kept.inputs.dataset_inputs) == [
        ("calibration.txt", "calibration"), ("evaluation.txt", "evaluation")]
    assert {Path(item.path).name.split("+")[0] for item in client.list_artifacts(kept.info.run_id, "images")} == {
        path.stem for path in (result.folder / "figures").iterdir()}

    exported(result, "gptq", result.folder / "gptq")
    exported(result, "recipe-auto-round", tmp_path / "recipe")
    recipe, model = sorted(client.search_logged_models([number]), key=lambda found: len(found.metrics or []))
    assert model.status == "READY" and model.source_run_id == kept.info.run_id
    assert model.name == "spqe-auto-qp-gptq-3bits-gptq" and recipe.params["format"] == "recipe-auto-round"
    assert model.params == {
        "format": "gptq", "folder": str(result.folder / "gptq"), "bits": "3", "bytes": str(result.plan.nbytes),
        "file_bytes": str((result.folder / "gptq" / "model.safetensors").stat().st_size)}
    scores = {metric.key: metric.value for metric in model.metrics}
    manifest = json.loads((result.folder / "gptq" / "impq.json").read_text())
    assert scores["exported_nll"] == pytest.approx(manifest["score"]["nll"]) and not recipe.metrics
    again = client.get_run(kept.info.run_id)
    assert {output.model_id for output in again.outputs.model_outputs} == {model.model_id, recipe.model_id}
    assert again.data.metrics["nll"] == kept.data.metrics["nll"]

    resume(result.folder, watched(tiny_config))
    assert "gptq" not in {item.path for item in client.list_artifacts(kept.info.run_id)}  # weights are not copied


def test_names_with_dollar_signs_are_no_formulas(tiny_config: RunConfig, texts: tuple[Path, Path],
                                                 tmp_path: Path) -> None:
    odd = tmp_path / "a$x_{$.txt"
    odd.write_text(texts[1].read_text())
    config = replace(tiny_config, tracking_uri="none", evaluation=replace(tiny_config.evaluation, source=str(odd)))
    paths = draw_figures(run(config), tmp_path / "figures")
    assert [path.stem for path in paths] == ["loss_against_bytes", "widths", "sensitivities"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_an_export_stands_without_its_store(tiny_config: RunConfig, tmp_path: Path,
                                            recwarn: pytest.WarningsRecorder) -> None:
    result = run(tiny_config)
    exported(result, "recipe-auto-round", tmp_path / "untracked")
    assert not [w for w in recwarn if "ExportTracker" in str(w.message)]
    folder = RunFolder(result.folder)
    for number, uri in enumerate(("http://127.0.0.1:9", f"sqlite:///{tmp_path}/gone.db")):
        folder.write_json(folder.tracking, {"uri": uri, "run_id": "0"})
        with pytest.warns(RuntimeWarning, match="ExportTracker failed in impq_exported: tracking"):
            exported(result, "recipe-auto-round", tmp_path / str(number))
        assert (tmp_path / str(number) / "layer_config.json").exists()
    assert not (tmp_path / "gone.db").exists()


def test_a_sweep_is_a_run_with_runs_below_it(tiny_config: RunConfig) -> None:
    from mlflow import MlflowClient

    base = replace(tiny_config, options={"backend": {"grid": "min-max"}})
    run_sweep(Sweep(base, {"estimator": ["spqe", "random"], "budget": ["2.5bits", "3bits"]}, {"permutations": "4"}),
              watched(base))
    client = MlflowClient(tiny_config.tracking_uri)
    [number] = experiments(tiny_config.tracking_uri).values()
    runs = client.search_runs([number], order_by=["attributes.start_time ASC"])
    parent, children = runs[0], runs[1:]
    assert parent.info.run_name == "sweep: 2 estimators, 2 budgets"
    assert parent.data.params["estimator"] == "spqe,random" and parent.data.params["model"] == tiny_config.model
    assert [child.info.run_name for child in children] == [
        "spqe auto qp gptq 2.5bits", "spqe auto qp gptq 3bits", "random qp gptq 2.5bits", "random qp gptq 3bits"]
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params["model"] == tiny_config.model and child.info.status == "FINISHED"
        assert f"| {child.info.run_name} |" in parent.data.tags["mlflow.note.content"]
