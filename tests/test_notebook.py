"""Results in notebooks: tables, frames, figures and progress; and the notebook of the examples, run on a tiny model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from apart import loaded_after
from finished import contrast
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from scenes import World

import impq_core
from impq_core import Comparison, RunResult, read_run
from impq_core.display.html import ink_on
from impq_core.errors import ImpqError
from impq_core.testing import planted_estimate

NOTEBOOK = Path(__file__).parents[1] / "examples" / "research.ipynb"


@pytest.fixture(scope="module")
def result(world: World) -> RunResult:
    return read_run(world.kept / "finished")


@pytest.fixture(scope="module")
def comparison(world: World) -> Comparison:
    return Comparison.read(world.kept / "finished", world.kept / "swept")


@pytest.fixture(scope="module")
def shown(result: RunResult, comparison: Comparison) -> dict[str, Any]:
    return {"run": result, "plan": result.plan, "estimate": result.estimate, "evaluation": result.evaluation,
            "comparison": comparison}


KINDS = ["run", "plan", "estimate", "evaluation", "comparison"]


class Reader(HTMLParser):
    """Collects text, checks that tags are balanced, and keeps attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.open, self.attributes = "", list[str](), list[tuple[str, str | None]]()
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_whole_loads_nothing_and_leaves_colours_of_text_to_the_page(kind: str, shown: dict[str, Any]) -> None:
    page = Reader(shown[kind]._repr_html_())
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href"} and "script" not in page.text and "url(" not in page.text
    colours = re.findall(r"(?<![-\w])color:\s*([^;}]+)", page.text)  # of the style sheet
    assert set(colours) == {"inherit", "inherit !important"} or set(colours) == {"inherit"}


def test_views_hold_the_numbers(shown: dict[str, Any], result: RunResult, comparison: Comparison) -> None:
    assert result.plan and result.evaluation and result.estimate
    texts = {kind: Reader(shown[kind]._repr_html_()).text for kind in KINDS}
    for kind in ("run", "evaluation"):
        for row in result.evaluation.rows:
            assert row.name in texts[kind] and f"{row.nll:.3f}" in texts[kind]
    assert f"{result.plan.nbytes / 1e6:.2f} MB" in texts["plan"]
    for layer in result.plan.space.layers:
        assert layer.name in texts["estimate"]
    [contest] = comparison.contests
    assert all(contest.label(run) in texts["comparison"] for run in contest.contestants)


def test_names_are_escaped(result: RunResult) -> None:
    from dataclasses import replace

    assert result.evaluation
    evil = replace(result.evaluation, text="<script>alert(1)</script>")
    assert "<script" not in evil._repr_html_() and "&lt;script" in evil._repr_html_()


def test_ink_is_readable_on_every_colour() -> None:
    from impq_core.compare.layers import UNQUANTIZED, width_colours

    for colour in {UNQUANTIZED, *(colour for count in range(1, 12) for colour in width_colours(count))}:
        assert contrast(colour, ink_on(colour)) > 3.5, colour


def test_frames_hold_the_numbers(shown: dict[str, Any], result: RunResult, comparison: Comparison) -> None:
    assert result.plan and result.evaluation and result.estimate
    frames = {kind: shown[kind].to_pandas() for kind in KINDS}
    rows = frames["evaluation"].set_index("allocation")
    for row in result.evaluation.rows:
        assert rows.loc[row.name, "nll_nats"] == row.nll
        minus = result.evaluation.against_plan(row)
        assert minus is None or rows.loc[row.name, "minus_plan_nats"] == pytest.approx(minus.mean)
    assert frames["plan"].size_bytes.sum() == result.plan.nbytes
    assert dict(zip(frames["plan"].layer, frames["plan"].choice, strict=True)) == {
        layer.name: result.plan.space.choices[k].name
        for layer, k in zip(result.plan.space.layers, result.plan.pick, strict=True)}
    costs = frames["estimate"].pivot(index="layer", columns="choice", values="cost_nats")
    for layer, values in zip(result.estimate.space.layers, result.estimate.linear, strict=True):
        names = [choice.name for choice in result.estimate.space.choices]
        np.testing.assert_array_equal(costs.loc[layer.name, names], values)
    assert len(frames["run"]) == 1 and frames["run"].nll_nats[0] == result.evaluation.plan.nll
    assert len(frames["comparison"]) == 3 and frames["comparison"].minus_best_nats.isna().any()
    assert set(frames["comparison"].folder) == {str(run.folder) for run in comparison.contests[0].contestants}


def test_scores_are_not_called_nats() -> None:
    from dataclasses import replace

    estimate = replace(planted_estimate(0, 4), is_loss=False)
    frame = estimate.to_pandas()
    assert "score" in frame and "cost_nats" not in frame
    assert "nats" not in Reader(estimate._repr_html_()).text


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_drawn_on_given_axes_or_on_their_own(kind: str, shown: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    assert shown[kind].plot(axes) is axes and axes.has_data()
    own = shown[kind].plot()
    assert own.has_data() and own._repr_png_().startswith(b"\x89PNG")
    assert own.get_xlabel()


def test_pyplot_is_left_alone(world: World) -> None:
    script = ("import impq_core\nresult = impq_core.read_run('finished')\n"
              "assert not {'pandas', 'matplotlib', 'IPython', 'torch'} & set(sys.modules)\n"
              "result.plot(), result._repr_html_(), result.to_pandas()")
    assert loaded_after(script, ("matplotlib.pyplot", "torch", "IPython"), world.kept) == []


def test_runs_on_two_texts_have_no_common_figure(comparison: Comparison) -> None:
    twice = Comparison(comparison.contests * 2)
    with pytest.raises(ImpqError, match="2 groups"):
        twice.plot()


def test_a_folder_without_runs_is_said(tmp_path: Path) -> None:
    with pytest.raises(ImpqError, match="holds no finished run"):
        Comparison.read(tmp_path)


def execute(notebook: Any, folder: Path) -> Any:
    return NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()


def test_progress_in_a_notebook_is_one_output_that_moves(tmp_path: Path) -> None:
    source = ("import impq_core\nplugins = impq_core.console()\n"
              "for stage in ('quantize', 'estimate'):\n"
              "    for done in range(51):\n"
              "        plugins.notify('impq_progress', stage=stage, done=done, total=50)\n"
              "plugins.notify('impq_run_failed', error=KeyboardInterrupt())\n"
              "plugins.notify('impq_progress', stage='again', done=0, total=2)\n")
    [cell] = execute(new_notebook(cells=[new_code_cell(source)]), tmp_path).cells
    assert [output.output_type for output in cell.outputs] == ["display_data"] * 2, cell.outputs
    first, second = (output.data["text/html"] for output in cell.outputs)
    assert first.count("<progress") == 2 and "estimate: 50 of 50" in first and "again: 0 of 2" in second


def test_the_notebook_runs(tmp_path: Path, tiny_llama: Path, texts: tuple[Path, Path],
                           empty_store: Callable[[Path], None]) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = [str(path) for path in (tiny_llama, *texts)]
    parameters.source += (f"\nmodel, calibration, evaluation = {names!r}"
                          "\nwindows, length = 8, 32")
    empty_store(tmp_path / "mlflow.db")
    done = execute(notebook, tmp_path)
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    runs = Comparison.read(tmp_path / "research-runs").to_pandas()
    assert set(runs.estimator) == {"isolated", "spqe", "ends"} and (tmp_path / "comparison.html").is_file()
    last = done.cells[-1].outputs[-1].data["text/html"]
    assert all(name in last for name in ("isolated", "spqe", "ends"))
    shutil.rmtree(tmp_path / "research-runs")


def test_every_name_of_the_package_can_be_had() -> None:
    for name in impq_core.__all__:
        assert getattr(impq_core, name)
