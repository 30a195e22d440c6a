"""The page of a comparison: its verdict, what it draws, and how it looks in a browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from finished import BASE, CONFIG, NOISE, Page, contrast, make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from impq_core.compare.contest import Contest
from impq_core.compare.html import render
from impq_core.compare.outcomes import prompts_of, task_tables
from impq_core.compare.read import gather
from impq_core.compare.uniform import UniformLine
from impq_core.compare.verdict import equal_loss, give_verdict
from impq_core.config import RunConfig
from impq_core.paired_answers import Answer, AnswerTable, Split
from impq_core.results import Row
from impq_core.task_scores import TaskScore, TaskTable
from impq_core.testing import planted_estimate

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SIZES = {"2.25bits": 80_000, "2.5bits": 90_000, "2.75bits": 95_000, "3bits": 100_000, "3.5bits": 115_000}
CSS = (Path(__file__).parents[1] / "impq_core" / "compare" / "page.css").read_text()


def line_at(nbytes: float) -> np.ndarray[Any, Any]:
    """The planted line between uniform models, above ``BASE``."""
    return 0.2 + (130_000 - nbytes) / 60_000 * (0.8 + NOISE)


def contest_of(folder: Path, config: RunConfig, gains: dict[str, float], **rest: Any) -> Contest:
    """A contest of one run for each budget, whose plan is better than the line by a gain."""
    for budget, gain in gains.items():
        make_run(folder / budget, replace(config, budget=budget), BASE + line_at(SIZES[budget]) - gain + NOISE / 50,
                 nbytes=SIZES[budget], **rest)
    [contest], _ = gather([folder])
    return contest


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(10, 1000), st.floats(0.01, 5)), min_size=2, max_size=6,
                unique_by=lambda point: point[0]), st.floats(0.01, 5), st.integers(5, 1200))
def test_the_size_of_equal_loss_is_where_the_line_first_reaches_it(points: list[tuple[int, float]], loss: float,
                                                                   size: int) -> None:
    models = sorted((Row(f"uniform {i}", BASE + level, nbytes, nbytes / 100) for i, (nbytes, level)
                     in enumerate(points)), key=lambda row: row.nbytes or 0)
    line = UniformLine(((models[0], models[-1]), tuple(models)))
    found = line.equal_loss(Row("plan", BASE + loss, size))
    assert found is not None and found.bits == pytest.approx(found.nbytes / 100)
    low, high = models[0].nbytes or 0, models[-1].nbytes or 0
    grid = np.linspace(low, high, 60)
    reached = [nbytes for nbytes in grid if line.at(nbytes).nll <= BASE.mean() + loss]
    if found.bound == "below":
        assert found.nbytes == low and reached[0] == low
    elif found.bound == "above":
        assert found.nbytes == high and not reached
    else:
        assert line.at(found.nbytes).nll == pytest.approx(BASE.mean() + loss)
        assert not [nbytes for nbytes in reached if nbytes < found.nbytes * (1 - 1e-9)]
    assert found.saved == pytest.approx(1 - size / found.nbytes)


def test_the_errors_of_the_size_and_of_what_is_saved_are_paired() -> None:
    """Windows drawn again and again: the spread is the standard error, to which what all models share adds nothing."""
    rng, found = np.random.default_rng(0), []
    for shared, own in zip(rng.normal(0, 0.3, (3000, len(BASE))), rng.normal(0, 0.01, (3000, len(BASE))), strict=True):
        windows = BASE + shared
        uniform = Row("uniform 2", windows + 1.0, 70_000, 2.0), Row("uniform 4", windows + 0.2, 130_000, 4.0)
        equal = UniformLine((uniform,)).equal_loss(Row("plan", windows + 0.5 + own, 100_000))
        assert equal is not None
        found.append((equal.nbytes, equal.saved, equal.stderr, equal.saved_stderr))
    nbytes, saved, *errors = np.array(found).T
    for values, stderr in zip((nbytes, saved), errors, strict=True):
        assert np.std(values) == pytest.approx(np.sqrt(np.mean(stderr**2)), rel=0.1)


@pytest.mark.parametrize("gain, outcome, words", [
    (0.2, "wins", ("as good as", "smaller")), (0.0, "ties", ("ties with uniform",)),
    (-0.1, "loses", ("loses to uniform", "0.100", "smaller"))])
def test_the_verdict_on_one_plan(gain: float, outcome: str, words: Sequence[str], tmp_path: Path) -> None:
    noisy = NOISE * (gain == 0)  # for a tie, a difference within its error
    make_run(tmp_path / "runs", CONFIG, BASE + line_at(100_000) - gain + noisy, references={})
    [contest], _ = gather([tmp_path / "runs"])
    verdict = give_verdict(contest)
    assert verdict.outcome == outcome and verdict.sentence.endswith(".") and "3.03 bits" in verdict.sentence
    assert all(word in verdict.sentence for word in words)
    if gain:  # the line falls by 0.8 over 60 kB
        equal = equal_loss(contest.contestants[0])
        assert equal is not None and equal.nbytes == pytest.approx(100_000 + gain / 0.8 * 60_000, rel=0.01)
        share = 1 - min(equal.nbytes, 1e5) / max(equal.nbytes, 1e5)
        assert f"{100 * share:.0f}" in re.sub(r"\.\d", "", verdict.sentence) or f"{100 * share:.1f}" in verdict.sentence


def test_a_plan_as_good_as_a_measured_model_is_compared_with_it(tmp_path: Path) -> None:
    make_run(tmp_path / "tie", CONFIG, BASE + 0.2 + NOISE / 10, references={})
    make_run(tmp_path / "better", replace(CONFIG, model="org/other"), BASE + 0.1, references={})
    tie, better = (give_verdict(contest).sentence for contest in reversed(gather([tmp_path])[0]))
    assert "as good as uniform 4 and 23 % smaller" in tie
    assert "better than uniform 4" in better and "23 % smaller" in better


def test_the_verdict_names_every_reference_that_is_not_beaten(tmp_path: Path) -> None:
    noise = NOISE - NOISE.mean()
    make_run(tmp_path / "run", CONFIG, BASE + 0.5 + noise, references={"first/last high": 0.3, "random 1": 0.501})
    verdict = give_verdict(gather([tmp_path])[0][0])
    assert verdict.outcome == "loses" and "loses to first and last layers wide by 0.200" in verdict.sentence
    assert "ties with the best random plan" in verdict.sentence


def test_the_largest_mix_that_is_not_better_is_named(tmp_path: Path) -> None:
    file = make_run(tmp_path / "run", CONFIG, BASE + 0.5, references={
        "mix Q2": 0.6, "mix Q3": 0.55, "mix Q4": 0.3, "mix Q5": math.nan}) / "evaluation.json"
    data = json.loads(file.read_text())
    for row in data["rows"]:
        if row["name"].startswith("mix"):
            row["bytes"] = {"mix Q2": 90_000, "mix Q3": 110_000, "mix Q4": 120_000, "mix Q5": 125_000}[row["name"]]
    file.write_text(json.dumps(data))
    [contest], _ = gather([tmp_path])
    assert "better than mix Q3, and 9 % smaller" in give_verdict(contest).sentence
    Page(render([contest]))


def test_the_verdict_on_several_budgets(tmp_path: Path) -> None:
    gains = {"2.25bits": 0.1, "2.5bits": 0.2, "2.75bits": 0.15, "3bits": 0.0, "3.5bits": -0.05}
    contest = contest_of(tmp_path, CONFIG, gains, references={})
    verdict = give_verdict(contest)
    saved = [equal_loss(runs[0]).saved for runs in contest.budgets.values()]  # type: ignore[union-attr]
    assert verdict.outcome == "loses"
    winning, lead, *rest = re.split(r"; |: ", verdict.sentence)
    assert "3 of 5 budgets" in winning and f"{100 * min(saved[:3]):.0f} % to {100 * max(saved):.0f} %" in winning
    assert "2.73 bits" in lead and "as good as" in lead  # the largest saving
    assert [("tie" in part, "lose" in part) for part in rest] == [(True, False), (False, True)]


def test_no_verdict_without_uniform_models(tmp_path: Path) -> None:
    file = make_run(tmp_path / "run", CONFIG, BASE + 0.3, references={}) / "evaluation.json"
    data = json.loads(file.read_text())
    data["rows"] = [row for row in data["rows"] if row["name"] in ("plan", "unquantized")]
    file.write_text(json.dumps(data))
    contest = gather([tmp_path])[0][0]
    verdict = give_verdict(contest)
    assert not verdict.outcome and "no uniform models" in verdict.sentence and "0.300" in verdict.sentence
    Page(render([contest]))


def test_a_sweep_of_one_estimator_has_one_curve_and_no_figure_of_cost(tmp_path: Path) -> None:
    contest = contest_of(tmp_path, CONFIG, dict.fromkeys(SIZES, 0.1), estimate=planted_estimate(1, 6))
    text = render([contest])
    titles = re.findall("<h4>(.*?)</h4>", text)
    assert titles[0].startswith("Better or worse") and not [title for title in titles if "search" in title]
    assert text.index("verdict") < text.index("<figure") < text.index("<table") < text.index('class="strip"')
    assert text.count('class="strip"') == len(SIZES) and text.count('<tbody class="plans">') == 1


def test_cost_is_drawn_once_if_it_differs(tmp_path: Path) -> None:
    for name, forwards in (("spqe", 100.0), ("isolated", 20.0)):
        contest_of(tmp_path / name, replace(CONFIG, estimator=name), {"2.5bits": 0.1, "3bits": forwards / 1000},
                   forwards=forwards)
    [contest], _ = gather([tmp_path])
    titles = re.findall("<h4>(.*?)</h4>", render([contest]))
    assert len([title for title in titles if "search" in title]) == 1


def test_identifiers_of_figures_do_not_clash(tmp_path: Path) -> None:
    contest = contest_of(tmp_path, CONFIG, {"2.5bits": 0.1, "3bits": 0.1}, estimate=planted_estimate(1, 6, strength=1))
    text = render([contest])
    made = re.findall(r'\bid="([^"]+)"', text)
    assert len(made) == len(set(made)) > 5
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(made)


def test_tasks_and_answers_are_shown_between_plans_and_widths(tmp_path: Path) -> None:
    contest_of(tmp_path, CONFIG, {"2.5bits": 0.1, "3bits": 0.1})
    right = np.tile([1.0, 0.0], 10)
    for budget, wrong in (("2.5bits", 4), ("3bits", 2)):
        documents = {"unquantized": right, "plan": right * (np.arange(20) >= wrong), "uniform 4": right}
        TaskTable(tuple(TaskScore(
            row=row, bytes=None if row == "unquantized" else 130_000 if row == "uniform 4" else SIZES[budget],
            task="<b>arc", metric="acc", filter="none", value=float(values.mean()), stderr=0.1, n=20,
            higher_is_better=True, aggregation="mean", documents=tuple(values), limit=20, fewshot=0, chat=False,
            batch_size=1, lm_eval="0.4", key="k") for row, values in documents.items())).save(
                tmp_path / budget / "tasks.json")
        split = Split(3, "It is a", " cat", f" <i>{budget}", 0.25) if budget == "2.5bits" else None
        AnswerTable((Answer("What is & it?", (), False, 8, "It is a cat.", f"It is a <i>{budget}." if split else
                            "It is a cat.", 5, 5, split, "k"),)).save(tmp_path / budget / "answers.json")
    [contest], _ = gather([tmp_path])
    [table] = task_tables(contest)
    shown = {line[0].text: line[2] for line in table.lines}
    assert list(shown) == ["unquantized", "2.5bits", "3bits", "uniform 4"] and not shown["unquantized"].note
    difference = right * (np.arange(20) < 4)  # paired over documents
    assert shown["2.5bits"].text == "0.400 ± 0.100"
    assert shown["2.5bits"].note == f"{-difference.mean():+.3f} ± {difference.std(ddof=1) / np.sqrt(20):.3f}"
    [prompt] = prompts_of(contest)
    assert [reply.model for reply in prompt.replies] == ["unquantized", "2.5bits", "3bits"]
    assert [reply.token for reply in prompt.replies] == ["", " <i>2.5bits", ""]
    assert "".join((prompt.replies[1].common, prompt.replies[1].token, prompt.replies[1].rest)) == "It is a <i>2.5bits."
    text = render([contest])
    assert not {"b", "i"} & set(Page(text).seen) and text.index("<h3>Plans") < text.index("<h3>Tasks") < text.index(
        "<h3>Answers") < text.index("<h3>Widths")


def test_tasks_asked_in_other_ways_are_not_put_into_one_table(tmp_path: Path) -> None:
    contest_of(tmp_path, CONFIG, {"2.5bits": 0.1, "3bits": 0.1})
    for budget, limit in (("2.5bits", 20), ("3bits", None)):
        TaskTable((TaskScore("plan", SIZES[budget], "arc", "acc", "none", 0.5, 0.1, 20, True, "mean", (), limit, 0,
                             False, 1, "0.4", "k"),)).save(tmp_path / budget / "tasks.json")
    assert [len(table.lines) for table in task_tables(gather([tmp_path])[0][0])] == [1, 1]


def test_what_all_texts_share_is_shown_once(tmp_path: Path) -> None:
    contest = contest_of(tmp_path, CONFIG, {"2.5bits": 0.1, "3bits": 0.1}, estimate=planted_estimate(1, 6))
    other = Contest(tuple(replace(run, evaluation=replace(run.evaluation, text="6 windows of c4"))
                          for run in contest.contestants))
    text = render([contest, other])
    assert text.count("<h3>Widths") == 1 and text.count('class="verdict') == text.count("<h3>Plans") == 2


@pytest.mark.parametrize("name", ["tasks.json", "answers.json"])
def test_a_broken_file_of_tasks_or_answers_is_named(name: str, tmp_path: Path) -> None:
    contest_of(tmp_path, CONFIG, {"2.5bits": 0.1, "3bits": 0.1})
    (tmp_path / "3bits" / name).write_text("{")
    [contest], [note] = gather([tmp_path])
    assert len(contest.contestants) == 1 and str(tmp_path / "3bits" / name) in note


def variables(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", css))


def test_text_and_curves_have_contrast_in_both_schemes() -> None:
    light, dark = (variables(part) for part in CSS.split("@media screen and (prefers-color-scheme: dark)")[:2])
    assert set(light) == set(dark)
    for scheme in (light, dark):
        pairs = [(ink, paper) for ink in ("ink", "muted", "link") for paper in ("paper", "panel")]
        pairs += [(word, f"{word}-panel") for word in ("good", "bad", "even")]
        pairs += [("ink", f"{word}-panel") for word in ("good", "bad", "even")]
        pairs += [(word, "paper") for word in ("good", "bad", "even")]
        assert {pair: ratio for pair in pairs if (ratio := contrast(scheme[pair[0]], scheme[pair[1]])) < 4.5} == {}
        lines = ("faint", *(f"c{i}" for i in range(7)))
        assert {name: ratio for name in lines if (ratio := contrast(scheme[name], scheme["paper"])) < 2} == {}
    assert set(re.findall(r"var\(--([\w-]+)\)", CSS)) <= set(light)


def test_figures_take_the_colours_of_the_page(tmp_path: Path) -> None:
    contest = contest_of(tmp_path, CONFIG, {"2.5bits": 0.1, "3bits": 0.1})
    text = render([contest])
    used = set(re.findall(r"var\(--([\w-]+), #", text))
    assert {"ink", "c0", "muted"} <= used <= set(variables(CSS))
    figures = "".join(re.findall(r"<figure>.*?</figure>", text, re.DOTALL))
    assert not re.findall(r"(?<!, )#[0-9a-f]{6}\b", figures)


@pytest.mark.browser
def test_the_page_in_a_browser(chrome: Chrome, tmp_path: Path) -> None:
    """Nothing is wider than the window, text is large enough to read, and the scheme is the reader's."""
    long = replace(CONFIG, model="an-organization/with-a-very-long-name-of-a-model-that-does-not-break-anywhere")
    contest = contest_of(tmp_path / "runs", long, dict.fromkeys(SIZES, 0.1), estimate=planted_estimate(1, 40))
    page = tmp_path / "page.html"
    page.write_text(render([contest]))
    papers = {}
    for width, most in ((390, 2600), (1400, 1800)):
        for scheme in ("light", "dark"):
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
                "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
            chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {
                "media": "screen", "features": [{"name": "prefers-color-scheme", "value": scheme}]})
            chrome.get(page.as_uri())
            look = chrome.execute_script("""
                const root = document.documentElement, body = getComputedStyle(document.body);
                const texts = [...document.querySelectorAll('figure text')].filter(text => text.checkVisibility());
                return {wide: root.scrollWidth, inner: window.innerWidth, high: root.scrollHeight,
                        paper: body.backgroundColor, ink: body.color,
                        lines: texts.map(text => getComputedStyle(text).fill),
                        sizes: texts.map(text => parseFloat(getComputedStyle(text).fontSize) *
                                                    Math.hypot(text.getScreenCTM().c, text.getScreenCTM().d))};""")
            assert look["wide"] <= look["inner"] == width and look["high"] < most, (width, scheme, look["high"])
            assert min(look["sizes"]) > 8
            papers[scheme] = look["paper"], look["ink"]
            assert look["ink"] in look["lines"]
    assert papers["light"] != papers["dark"] and papers["light"][0] == "rgb(255, 255, 255)"
    chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    assert chrome.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
