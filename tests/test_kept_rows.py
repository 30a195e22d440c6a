"""Kept rows of benchmarks, the distances of regret.py, and benchmarks of plans on a tiny model."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impq_core.errors import ImpqError
from impq_core.testing import made_text, tiny_model
from impq_core.testing.crew import InProcess

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # its scripts import each other as neighbours

import cells
import default
import every
import paper
import paper_report
import regret
import regret_report
import task_columns
from common import command
from rows import UNIFORM, Kept, PlanRow, Problem, line_at, problems, read_rows

ROW = PlanRow("tiny", "hqq", "v", ("4", "2"), "block", 3.0, 120, 110, "t", "spqe", 0, 2.5, 510,
              np.array([1.0, 2.0]), np.array([0.1, 0.2]), (0, 1, 1), "a text", "cpu", "2026-01-01")
LOSSES = st.lists(st.floats(0, 20), min_size=2, max_size=2).map(np.array)


def same(a: PlanRow, b: PlanRow) -> bool:
    arrays = [np.array_equal(x, y) for x, y in ((a.nll, b.nll), (a.kl, b.kl))]
    return all(arrays) and replace(a, nll=b.nll, kl=b.kl) == b


@given(LOSSES, LOSSES, st.integers(2, 12).flatmap(lambda m: st.tuples(
    st.just(m), st.lists(st.integers(0, m - 1), max_size=5))), st.text(max_size=9))
def test_a_row_is_read_as_it_was_written(nll: Any, kl: Any, menu: tuple[int, list[int]], method: str) -> None:
    row = replace(ROW, nll=nll, kl=kl, menu=tuple(map(str, range(menu[0]))), widths=tuple(menu[1]), method=method)
    assert "\n" not in json.dumps(row.to_data())
    assert same(PlanRow.of_data(json.loads(json.dumps(row.to_data()))), row)


@settings(max_examples=20)
@given(st.integers(1, 400))
def test_a_killed_writer_loses_its_last_line_only(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("kept") / "rows.jsonl"
    Kept(path).add([ROW, replace(ROW, seed=1)])
    length = len(json.dumps(ROW.to_data())) + 1
    whole = path.read_bytes()
    path.write_bytes(whole[:-min(cut, length - 1)])
    assert [row.seed for row in read_rows([path])] == [0]
    again = Kept(path)
    assert again.missing(vars(ROW), "spqe", 0, [3.0, 3.5]) == [3.5]
    assert again.missing(vars(ROW), "spqe", 1, [3.0]) == [3.0]
    again.add([replace(ROW, seed=1)])
    assert path.read_bytes() == whole


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW.to_data()) + '\n{"model": "other"}\n')
    with pytest.raises(ImpqError, match=r"rows\.jsonl, line 2"):
        Kept(path)


def uniform(nbytes: int, *nll: float) -> PlanRow:
    return replace(ROW, method=UNIFORM, nbytes=nbytes, budget_bytes=nbytes, nll=np.array(nll), kl=np.array(nll) / 2)


def test_the_line_joins_uniform_models_window_by_window() -> None:
    models = [uniform(200, 1.0, 3.0), uniform(100, 5.0, 4.0), uniform(150, 2.0, 8.0)]
    np.testing.assert_allclose(line_at(models, 150), [2.0, 8.0])
    np.testing.assert_allclose(line_at(models, 125), [3.5, 6.0])
    np.testing.assert_allclose(line_at(models, 160), [1.8, 7.0])
    np.testing.assert_allclose(line_at(models, 125, kl=True), [1.75, 3.0])
    for outside in (99, 201):
        with pytest.raises(ImpqError):
            line_at(models, outside)


def planted(seed: int) -> list[PlanRow]:
    """Rows of three methods at three budgets, two of them with two seeds, and three uniform models."""
    rng = np.random.default_rng(seed)
    rows = [uniform(size, *rng.uniform(1, 9, 2)) for size in (100, 200, 300)]
    for method, seeds in (("a", 2), ("b", 1), ("c", 2)):
        for budget in (120, 180, 250):
            rows += [replace(ROW, method=method, seed=number, budget=budget / 100, budget_bytes=budget,
                             nbytes=budget - int(rng.integers(0, 20)), nll=rng.uniform(1, 9, 2))
                     for number in range(seeds)]
    return rows


@given(st.integers(0, 10_000))
def test_the_best_plan_is_the_least_of_all_that_fit(seed: int) -> None:
    rows = planted(seed)
    [problem] = problems(rows, regret_report.Compared)
    for nbytes in problem.budgets:
        least = min(row.nll.mean() for row in rows if row.nbytes <= nbytes)
        assert problem.best(nbytes).nll.mean() == least
        assert problem.best(nbytes).nbytes <= nbytes
        for entry in problem.entries(nbytes):
            alike = [row.nll.mean() for row in rows if (row.method, row.budget_bytes) == (entry.method, nbytes)]
            assert entry.nll.mean() == pytest.approx(np.mean(alike))
            assert entry.nll.mean() >= least
            assert (entry.spread is None) == (len(alike) == 1)


def test_a_row_of_another_calibration_text_is_measured_again(tmp_path: Path) -> None:
    """And stands for its seed in the page."""
    kept = Kept(tmp_path / "rows.jsonl")
    kept.add([replace(ROW, read="old")])
    facts = {name: getattr(ROW, name) for name in ("model", "backend", "variants", "text", "menu", "granularity",
                                                   "tokens")}
    assert kept.missing({**facts, "read": "old"}, "spqe", 0, [3.0]) == []
    assert kept.missing({**facts, "read": "new"}, "spqe", 0, [3.0]) == [3.0]
    kept.add([replace(ROW, read="new")])
    [problem] = problems(read_rows([kept.path]), Problem)
    assert [row.read for row in problem.plans] == ["new"]


def test_only_rows_that_differ_in_the_seed_are_averaged() -> None:
    """By hand: a plan of 2 bits short of the line by 0.25 and one of another menu beyond it by 1, both of two seeds."""
    uniforms = [replace(ROW, method=UNIFORM, nbytes=size, budget=bits, nll=np.full(2, loss), kl=np.full(2, loss - 1))
                for bits, size, loss in ((2.0, 100, 4.0), (4.0, 120, 2.0))]
    plans = [replace(ROW, seed=seed, nll=np.full(2, 2.75 + 0.1 * seed - 0.05), kl=np.full(2, 1.5)) for seed in (0, 1)]
    others = [replace(row, menu=("4", "3", "2"), nll=row.nll + 1.25, kl=np.zeros(0)) for row in plans]
    slower = [replace(row, tokens=2 * row.tokens, granularity="linear") for row in plans]
    [problem] = problems([*uniforms, *plans, *others, *slower], Problem)
    lines = {(line[3], line[1]): line[4:] for line in default.lines_of(problem)}
    first, second = "spqe, menu 4,2", "spqe, menu 4,3,2"
    assert lines[first, "block"] == ["2", "2", "2.750", "0.071", "-0.250 ± 0.000", "-0.500 ± 0.000"]
    assert lines[second, "block"] == ["2", "2", "4.000", "0.071", "+1.000 ± 0.000", ""]
    assert f"spqe on {2 * ROW.tokens:,} tokens, menu 4,2" in {method for method, _ in lines}
    [compared] = problems([*uniforms, *plans, *others, *slower], regret_report.Compared)
    entries = {(entry.method, entry.granularity): entry for entry in compared.entries(ROW.budget_bytes)}
    assert entries[first, "block"].spread == pytest.approx(0.1 / np.sqrt(2))
    assert entries[f"spqe on {2 * ROW.tokens:,} tokens, menu 4,2", "linear"].forwards == 2 * ROW.forwards


def test_a_page_without_folders_still_names_models_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gemma").mkdir()
    monkeypatch.setattr(sys, "argv", ["/x/y/regret.py", "--models", f"demo,{tmp_path}/gemma", "--workers",
                                      "ray://10.0.0.1:6379", "--add", "a=b:qp:c=d"])
    assert command() == ("python benchmarks/regret.py --models demo,gemma --workers ray://10.0.0.1:6379 --add "
                         "a=b:qp:c=d")


def test_rows_of_other_problems_are_not_compared(tmp_path: Path) -> None:
    rows = planted(0)
    others = [replace(row, text="other", nll=row.nll - 1.0) for row in rows]
    first, second = problems([*rows, *others], regret_report.Compared)
    for nbytes in first.budgets:
        assert first.best(nbytes).nll.mean() == pytest.approx(second.best(nbytes).nll.mean() + 1.0)
    page = "\n".join(regret_report.report([*rows, *others]))
    assert {problem.title for problem in (first, second)} == {"tiny, hqq, text t", "tiny, hqq, text other"}
    assert all(f"\n## {problem.title}\n" in page for problem in (first, second))
    regret_report.draw([*rows, *others], tmp_path / "regret.png")
    assert (tmp_path / "regret.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("paper")
    model = tiny_model(folder / "model", blocks=3)
    for name, seed in (("calibration", 0), ("text", 1)):
        (folder / f"{name}.txt").write_text(made_text(seed, 20_000))
    return ["--models", str(model), "--backends", "hqq", "--windows", "2", "--evaluation-windows", "3", "--length",
            "32", "--calibration", str(folder / "calibration.txt"), "--text", str(folder / "text.txt"),
            "--device", "cpu"]


@pytest.fixture(autouse=True)
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are written into the folder of the test."""
    monkeypatch.setattr(regret, "RESULTS", tmp_path)
    monkeypatch.setattr("common.RESULTS", tmp_path)


def losses_of(path: Path) -> dict[Any, tuple[Any, ...]]:
    return {row.identity: (row.nll.tolist(), row.widths, row.nbytes, row.forwards) for row in read_rows([path])}


def test_the_papers_protocol_continues_where_it_was_killed(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "whole" / "paper.jsonl"
    given_words = [*words, "--permutations", "2", "--seeds", "2"]
    assert paper.main([*given_words, "--kept", str(path)]) == 0
    whole = losses_of(path)
    rows = read_rows([path])
    for method in ("LIM", "CoopQ, 2 permutations, measured with Quanto", "CoopQ, 2 permutations, measured as deployed"):
        seeds = {row.seed for row in rows if row.method == method}
        assert seeds == {0, 1}, method
        assert {row.budget for row in rows if row.method == method} == set(paper.BUDGETS)
    assert all(row.nbytes <= row.budget_bytes for row in rows)
    lines = path.read_bytes().splitlines(keepends=True)
    other = tmp_path / "killed" / "paper.jsonl"
    other.parent.mkdir()
    other.write_bytes(b"".join(lines[:len(lines) // 2]) + lines[len(lines) // 2][:50])
    assert paper.main([*given_words, "--kept", str(other)]) == 0
    assert losses_of(other) == whole
    page = "\n".join(paper_report.report(rows))
    assert "Llama-3.1-8B, GPTQ, as published" in page
    [unquantized] = (float(np.exp(row.nll.mean())) for row in rows if row.method == "unquantized")
    assert f"unquantized {paper_report.rounded(unquantized)}." in page


def test_a_method_of_ones_own_is_measured_beside_others(words: list[str], tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    assert regret.main([*words, "--granularities", "group", "--methods", "kurtosis", "--refine", "3", "--kept",
                        str(kept), "--add", "mine=random:greedy", "--estimator", "first-last", "--bits", "4,3,2",
                        "--add", "pairs=spqe:qp:surrogate=covariance:permutations=4",
                        "--add", "sums=spqe:qp:surrogate=additive:permutations=4"]) == 0
    rows = read_rows([kept])
    names = {row.method for row in rows}
    assert {"kurtosis", "mine", "first-last", "pairs", "sums", "swaps, 3 forwards from the best"} <= names
    assert {row.menu for row in rows} == {("4", "3", "2")}
    assert not any(row.read for row in rows if row.method == "kurtosis")
    assert {bool(row.read) for row in rows if row.method in ("pairs", "sums")} == {True}
    refined = [row for row in rows if row.method.startswith("swaps")]
    assert {row.budget for row in refined} == {2.5, 3.0, 3.5}
    assert all(row.forwards > 0 and row.nbytes <= row.budget_bytes for row in refined)
    assert "| mine | group |" in (tmp_path / "regret.md").read_text()


def test_a_benchmark_measures_the_same_with_workers(words: list[str], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches on the texts of two seeds take turns on the same workers."""
    plugin = tmp_path / "crew.py"
    plugin.write_text("from impq_core.testing.crew import InProcessPlugin\n\n"
                      "impq_crews = InProcessPlugin().impq_crews\n")
    found = {}
    for workers in ("0", "inprocess://2"):
        monkeypatch.setenv("IMPQ_CACHE", str(tmp_path / f"cache-{workers[:1]}"))
        InProcess.carried.clear()
        path = tmp_path / f"kept-{workers[:1]}.jsonl"
        assert regret.main([*words, "--granularities", "block", "--budgets", "3", "--methods", "guided-output,isolated",
                            "--seeds", "2", "--refine", "0", "--kept", str(path), "--plugin", str(plugin),
                            "--workers", workers, "--threads", "1"]) == 0
        found[workers] = losses_of(path)
    assert {"losses", "gradients", "score", "variants"} <= set(InProcess.carried)
    assert found["0"] == found["inprocess://2"]
    for method in ("guided-output", "isolated"):
        assert {row.seed for row in read_rows([tmp_path / "kept-0.jsonl"]) if row.method == method} == {0, 1}


def test_each_row_is_asked_tasks_once(words: list[str], tmp_path: Path) -> None:
    """The unquantized model's answers are those of transformers; a row that has answers is not asked again."""
    kept = tmp_path / "rows.jsonl"
    given_words = [*words, "--granularities", "block", "--estimators", "guided-output", "--probe-windows", "2",
                   "--kept", str(kept), "--threads", "1", "--dtype", "float32"]
    assert default.main(given_words) == 0
    before = losses_of(kept)
    asked = [*given_words, "--tasks", "continuation,last-word", "--limit", "3"]
    assert default.main(asked) == 0
    rows = read_rows([kept])
    assert losses_of(kept) == before
    assert all({name: len(values) for name, values in row.tasks.items()} == {
        "continuation acc": 3, "last-word acc": 3, "last-word ll": 3} for row in rows)
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:-2]) + lines[-2][:40])  # killed while the last but one was written
    assert default.main(asked) == 0
    assert [row.tasks for row in read_rows([kept])] == [row.tasks for row in rows]
    assert kept.read_bytes() == b"".join(lines)
    [exact] = (row for row in rows if row.method == "unquantized")
    documents = {name: [json.loads(line) for line in next((tmp_path / "tasks").glob(f"*/{name}.jsonl")).open()][:3]
                 for name in ("continuation", "last-word")}
    likelihood = likelihoods(words[1])
    assert exact.tasks["last-word ll"] == pytest.approx(
        [likelihood(each["passage"], f" {each['word']}") for each in documents["last-word"]], abs=1e-3)
    assert exact.tasks["continuation acc"] == [
        np.argmax([likelihood(each["passage"], f" {choice}") for choice in each["choices"]]) == each["answer"]
        for each in documents["continuation"]]
    assert "## model, hqq: tasks" in (tmp_path / "default.md").read_text()
    assert "| 16 | unquantized |  | 1 |" in (tmp_path / "default.md").read_text()


def likelihoods(model: str) -> Any:
    """The log-likelihood of a text behind another, nats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)

    def of(passage: str, text: str) -> float:
        first, second = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (passage, text))
        ids = torch.tensor([*first, *second])
        with torch.no_grad():
            found = network(ids[None]).logits[0].log_softmax(-1)
        return float(found[len(first) - 1:-1].gather(1, ids[len(first):, None]).sum())

    return of


def test_the_readme_names_every_benchmark_and_page() -> None:
    folder = Path(cells.__file__).parent
    scripts = {path.name for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    pages = {path.name for path in (folder / "results").glob("*.md")} - {"times.md"}
    named = set(re.findall(r"`([\w-]+\.(?:py|md))`", (folder / "README.md").read_text()))
    assert scripts - named == {"every.py"}
    assert pages <= named
    assert {f"{name}.py" for name in every.SCRIPTS} <= scripts


@given(st.integers(0, 1000), st.integers(200, 9000))
def test_tasks_made_from_a_text_have_their_answers_in_it(seed: int, characters: int) -> None:
    words = made_text(seed, characters).split()
    text = " ".join(words)
    for each in task_columns.continuations(words):
        assert f"{each['passage']} {each['choices'][each['answer']]}" in text
        assert len(set(each["choices"])) == len(each["choices"]) == task_columns.CHOICES
    asked = [*task_columns.last_words(words)]
    again = re.compile("[a-z]{5,}")
    found = [end for end in range(task_columns.PASSAGE, len(words))
             if again.fullmatch(words[end]) and words[end] in words[end - task_columns.PASSAGE:end]]
    assert bool(asked) == bool(found)
    for each in asked:
        assert f"{each['passage']} {each['word']}" in text
        assert each["word"] in each["passage"].split()


@pytest.mark.parametrize(("script", "bad", "named"), [
    (paper, ["--backends", "hqqq"], "hqqq"), (paper, ["--models", "/no/model"], "/no/model"),
    (paper, ["--permutations", "1"], "--permutations"), (paper, ["--seeds", "0"], "--seeds"),
    (paper, ["--report"], "kept.jsonl"), (paper, ["--text", "/no/text.txt"], "/no/text.txt"),
    (paper, ["--device", "cudaa"], "cudaa"), (paper, ["--workers", "many"], "many"),
    (paper, ["--workers", "nobody://2"], "nobody"), (paper, ["--tasks", "/no/mine.jsonl"], "/no/mine.jsonl"),
    (paper, ["--tasks", "continuation,"], "--tasks"), (paper, ["--tasks", "last-word", "--limit", "0"], "--limit"),
    (paper, ["--rows", "/no/rows.jsonl", "--report"], "/no/rows.jsonl"), (paper, ["--threads", "-1"], "threads"),
    (regret, ["--estimator", "random"], "my-random=random"), (regret, ["--add", "uniform=random"], "my-uniform=random"),
    (default, ["--probe-windows", "0"], "--probe-windows"), (default, ["--probe-windows", "x"], "--probe-windows"),
    (default, ["--estimators", "guidedoutput"], "guidedoutput"), (default, ["--windows", "65"], "65"),
    (regret, ["--methods", "kurtosiss"], "kurtosiss"), (regret, ["--add", "mine"], "--add mine"),
    (regret, ["--add", "mine=spqee"], "spqee"), (regret, ["--add", "mine=random:qpp"], "qpp"),
    (regret, ["--add", "mine=spqe:qp:permutationz=4"], "permutationz"),
    (regret, ["--add", "mine=spqe:qp:permutations=x"], "permutations"),
    (regret, ["--add", "kurtosis=random"], "kurtosis"), (regret, ["--budgets", "2.5,x"], "--budgets"),
    (regret, ["--budgets", "9"], "9"), (regret, ["--granularities", "rows"], "rows"),
    (regret, ["--plugin", "/no/plugin.py"], "/no/plugin.py"), (regret, ["--report"], "kept.jsonl"),
])
def test_a_wrong_word_is_named_before_a_model_is_loaded(script: Any, bad: list[str], named: str, words: list[str],
                                                        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(cells, "Session", loaded)
    code = script.main([*words, "--kept", str(tmp_path / "kept.jsonl"), *bad])
    bar = "Loading weights"  # transformers' own
    [line] = [line for line in capsys.readouterr().err.splitlines() if line and bar not in line]
    assert code in (1, 2)
    assert named in line
