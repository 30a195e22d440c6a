"""``impq show``: what a run ended with, printed again from its files; and the map of a plan's widths."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from apart import HEAVY, loaded_after
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from scenes import World

from impq_core.display.progress import console
from impq_core.errors import ImpqError
from impq_core.runs.pipeline import resume
from impq_core.runs.reading import progress_of, read_run
from impq_core.space import Choice, LayerSpec, LinearSpec, Pinned, SearchSpace
from impq_core.types import Plan
from impq_core.width_map import MOST_ROWS, WidthMap


@pytest.fixture
def fresh(world: World) -> World:
    world.reset()
    return world


def test_show_prints_what_the_run_printed(fresh: World) -> None:
    """From its first line about the plan to the end of the table, but for the seconds that resuming took."""
    run = fresh.ask("run --plan finished/plan.json --tracking-uri none")
    assert run.code == 0, run.err
    [folder] = (fresh.here / "impq-runs").iterdir()
    shown = fresh.ask(f"show impq-runs/{folder.name}")
    end = shown.out[shown.out.index("plan: "):]
    assert shown.code == 0 and not shown.touched and end.count("\n") > 10
    assert end in run.out


def test_a_result_is_read_as_it_was_returned(fresh: World) -> None:
    with fresh.inside(), redirect_stdout(StringIO()):
        result = resume("finished", console())
        read = read_run("finished")
    for name in ("folder", "config", "measured_loss", "forwards", "rest_bytes", "seconds", "digests", "model_bytes",
                 "state"):
        assert getattr(read, name) == getattr(result, name), name
    assert read.plan is not None and result.plan is not None
    for name in ("budget_bytes", "predicted_loss", "bound", "method", "is_loss", "file_bytes", "nbytes"):
        assert getattr(read.plan, name) == getattr(result.plan, name), name
    assert dict(read.plan.provenance) == json.loads(json.dumps(dict(result.plan.provenance)))
    assert read.evaluation is not None and result.evaluation is not None
    assert read.evaluation.to_dict() == result.evaluation.to_dict()
    assert read.estimate is not None and result.estimate is not None
    np.testing.assert_array_equal(read.estimate.linear, result.estimate.linear)
    assert len(read.measurements or ()) == len(result.measurements or ()) > 0


def test_an_estimate_and_a_run_of_an_older_impq_are_shown(fresh: World) -> None:
    estimated = fresh.ask("show estimated")
    assert estimated.code == 0 and "--resume" in estimated.out and "full-model forwards" in estimated.out
    cost = fresh.here / "finished" / "cost.json"
    data = json.loads(cost.read_text())
    cost.write_text(json.dumps({name: data[name] for name in ("forwards", "seconds")}))
    shown = fresh.ask("show finished")
    assert shown.code == 0 and "whole model" not in shown.out and "uniform 2" in shown.out


def test_an_unfinished_run_says_what_it_has(fresh: World) -> None:
    folder = fresh.here / "half"
    shutil.copytree(fresh.here / "estimated", folder)
    for name in ("estimate.npz", "measurements.npz", "cost.json"):
        (folder / name).unlink()
    losses = len((folder / "measurements.jsonl").read_text().splitlines()) - 1
    (folder / "error.txt").write_text("Traceback\nKeyError: 'x'\n")
    progress = progress_of(folder)
    assert (progress.losses, progress.scores, progress.working, progress.error) == (losses, 0, False, "KeyError: 'x'")
    shown = fresh.ask("show half")
    assert shown.code == 0 and f"{losses} losses" in shown.out and "KeyError" in shown.out
    with pytest.raises(ImpqError, match="--resume"):
        read_run(folder)
    with FileLock(folder / ".lock"):
        assert progress_of(folder).working and "--resume" not in fresh.ask("show half").out


def test_show_imports_nothing_heavy(fresh: World) -> None:
    script = "from impq_core.cli import main\nmain(['show', 'finished', '--json'])"
    assert loaded_after(script, (*HEAVY, "pandas", "matplotlib"), fresh.here) == []


def space_of(kinds: list[str], blocks: int, choices: tuple[Choice, ...], pins: tuple[Pinned, ...] = ()) -> SearchSpace:
    layers = tuple(layer(f"model.layers.{block}.{kind}".rstrip("."), block) for block in range(blocks)
                   for kind in kinds if not any(pin.layer.name.endswith(f"{block}.{kind}") for pin in pins))
    nbytes = np.tile(np.arange(len(choices), 0, -1) * 10, (len(layers), 1))
    return SearchSpace(layers, choices, nbytes, pins)


def layer(name: str, block: int) -> LayerSpec:
    return LayerSpec(name, block, (LinearSpec(name, 4, 4),))


WIDTHS = (Choice(4, 64), Choice(3, 64), Choice(2, 64))


@given(st.integers(1, 23),
       st.lists(st.sampled_from(["self_attn.qkv", "mlp.down", "mlp.3.up"]), min_size=1, unique=True),
       st.data())
def test_every_layer_has_its_character(blocks: int, kinds: list[str], data: st.DataObject) -> None:
    space = space_of(kinds, blocks, WIDTHS)
    pick = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(space), max_size=len(space))))
    plan = Plan(space, pick, space.high_bytes)
    _, ruler, *rows = WidthMap.of(plan).lines()
    start = ruler.index("0")
    assert {row[:start].strip(): row[start:] for row in rows} == {
        kind: "".join(str(plan.widths()[f"model.layers.{block}.{kind}"]) for block in range(blocks)) for kind in kinds}
    assert all(ruler[start + tens:].startswith(str(tens)) for tens in range(0, blocks, 10))


def test_names_get_letters_and_other_layers_their_own_rows() -> None:
    choices = (Choice(4.5, 256, "Q4_K"), Choice(2.3, 256, "IQ2_XS"))
    pins = (Pinned(layer("model.layers.1.mlp", 1), None, 32, 10, 20),
            Pinned(layer("model.embed_tokens", -1), Choice(8.5, 32, "Q8_0"), 30, 10, 20))
    space = space_of(["mlp", "attn"], 2, choices, pins)
    plan = Plan(space, np.array([0, 1, 1]), space.high_bytes)
    head, _, *rows = WidthMap.of(plan).lines()
    assert all(word in head for word in ("a Q4_K", "b IQ2_XS", "c Q8_0", ". unquantized"))
    assert {row.split()[0]: row.split()[1] for row in rows} == {"mlp": "a.", "attn": "bb", "model.embed_tokens": "c"}


def test_experts_share_a_row_of_counts() -> None:
    kinds = [f"mlp.experts.{number}" for number in range(MOST_ROWS + 1)]
    space = space_of(kinds, 2, WIDTHS)
    pick = np.random.default_rng(0).integers(0, 3, len(space))
    [row] = WidthMap.of(Plan(space, pick, space.high_bytes)).lines()[2:]
    counts = Counter(pick.tolist())
    assert row.split("  ")[-1] == f"{counts[0]} at 4, {counts[1]} at 3, {counts[2]} at 2"
