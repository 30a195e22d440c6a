"""Comparison of finished runs, from synthetic folders and from one real tiny run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apart import HEAVY, loaded_after
from finished import BASE, CONFIG, NOISE, WINDOWS, Page, make_run

from impq_core.cli import main
from impq_core.compare.contest import Contest
from impq_core.compare.html import render
from impq_core.compare.read import gather
from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.runs.pipeline import run
from impq_core.testing import planted_estimate
from impq_core.types import Measurements


def test_differences_are_paired_over_windows(tmp_path: Path) -> None:
    make_run(tmp_path / "a", CONFIG, BASE + 0.5)
    make_run(tmp_path / "b", replace(CONFIG, estimator="isolated"), BASE + 0.5 + 0.1 + NOISE)
    [contest], notes = gather([tmp_path])
    best, other = contest.budgets["3bits"]
    assert not notes and contest.label(best) == "spqe" and contest.label(other) == "isolated"
    gap = contest.behind_best(other)
    assert gap is not None and contest.behind_best(best) is None
    difference = 0.1 + NOISE
    assert gap.mean == pytest.approx(difference.mean())
    assert gap.stderr == pytest.approx(math.sqrt(((difference - difference.mean()) ** 2).sum() / 5 / 6))
    # A line between uniform models is as paired as they are: half of each at 100 kB.
    line = best.gaps["line"]
    assert line.mean == pytest.approx(0.5 - 0.6 - NOISE.mean() / 2)
    assert line.stderr == pytest.approx((NOISE / 2).std(ddof=1) / math.sqrt(6))
    assert best.rivals["random"].name == "random 2" and best.gaps["random"].mean == pytest.approx(-0.2)


@pytest.mark.parametrize("change", [{"unquantized": BASE + NOISE}, {"text": "6 windows of c4"}, {"config": "model"}])
def test_what_was_scored_on_other_windows_is_never_compared(change: dict[str, Any], tmp_path: Path) -> None:
    make_run(tmp_path / "a", CONFIG, BASE + 0.5)
    other = replace(CONFIG, model="org/other") if change.pop("config", None) else CONFIG
    make_run(tmp_path / "b", other, BASE + 0.7, **change)
    contests, _ = gather([tmp_path])
    assert [len(contest.contestants) for contest in contests] == [1, 1]
    assert all(contest.behind_best(one) is None for contest in contests for one in contest.contestants)


def test_a_plan_that_loses_is_said_to_lose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "good", replace(CONFIG, estimator="isolated"), BASE + 0.55)
    make_run(tmp_path / "bad", CONFIG, BASE + 0.75)
    make_run(tmp_path / "broken", replace(CONFIG, estimator="zscore"), BASE * math.nan)
    make_run(tmp_path / "endless", replace(CONFIG, estimator="lim"), BASE * math.inf)
    main(["compare", str(tmp_path), "--no-html"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "beats all by ≥ 0.0500" in lines["isolated"] and "LOSES" not in lines["isolated"]
    assert "LOSES to line by 0.1500" in lines["spqe"] and "random by 0.0500" in lines["spqe"]
    assert "LOSES to line by nan" in lines["zscore"] and "LOSES to line by inf" in lines["lim"]
    [contest], _ = gather([tmp_path])
    assert set(contest.budgets["3bits"][1].losses) == {"line", "random"}
    page = render([contest])
    assert page.count('class="loses"') == 8 and page.count('class="verdict wins"') == 1


def test_a_difference_within_two_standard_errors_is_a_tie(tmp_path: Path) -> None:
    noise = np.tile([0.1, -0.1], len(BASE) // 2 + 1)[:len(BASE)]
    make_run(tmp_path / "a", CONFIG, BASE + 0.601 + noise)
    [contest], _ = gather([tmp_path])
    [one] = contest.contestants
    assert one.verdict.startswith("ties with ") and "± 0.0" in one.verdict and not one.losses


def test_budgets_and_backends(tmp_path: Path) -> None:
    for backend in ("gptq", "hqq"):
        for budget in ("3bits", "60%"):
            make_run(tmp_path / backend / budget, replace(CONFIG, backend=backend, budget=budget), BASE + 0.5)
    make_run(tmp_path / "wider", replace(CONFIG, bits=(3, 8), budget="60%"), BASE + 0.5)
    make_run(tmp_path / "given", replace(CONFIG, plan="plan.json", budget="2.2bits"), BASE + 0.4)
    make_run(tmp_path / "again", replace(CONFIG, options={"estimator": {"permutations": 8}}), BASE + 0.5)
    make_run(tmp_path / "better", replace(CONFIG, refine=40), BASE + 0.5)
    [contest], _ = gather([tmp_path / "gptq", tmp_path])  # a run that is named twice is one run
    shown = {budget: sorted(map(contest.label, those)) for budget, those in contest.budgets.items()}
    assert shown == {
        "3bits": ["given plan.json, gptq, 2/4 bits, unrefined", "spqe, gptq, 2/4 bits, refined 40 by swaps",
                  "spqe, gptq, 2/4 bits, unrefined (3bits)", "spqe, gptq, 2/4 bits, unrefined (again)",
                  "spqe, hqq, 2/4 bits, unrefined"],
        "60% of 4 bits": ["spqe, gptq, 2/4 bits, unrefined", "spqe, hqq, 2/4 bits, unrefined"],
        "60% of 8 bits": ["spqe, gptq, 3/8 bits, unrefined"]}


def test_plans_with_and_without_embeddings_have_other_budgets(tmp_path: Path) -> None:
    """Whether the embeddings are layers by a key, a pin or a given plan."""
    inside = make_run(tmp_path / "inside", replace(CONFIG, plan="inside.json"), BASE)
    both = make_run(tmp_path / "both", replace(CONFIG, plan="both.json"), BASE)
    plan = json.loads((both / "plan.json").read_text())
    for name in ("inside", "both"):
        plan["layers"]["lm_head"] = None if name == "inside" else {"bits": 4, "group_size": 64}
        (tmp_path / name / "plan.json").write_text(json.dumps(plan))
    [contest], _ = gather([inside, both])
    assert {budget: len(runs) for budget, runs in contest.budgets.items()} == {"3bits": 1, "3bits with embeddings": 1}


def test_a_given_plan_stands_beside_plans_of_its_size(tmp_path: Path) -> None:
    own = make_run(tmp_path / "own", replace(CONFIG, budget="100700B"), BASE + 0.5)
    make_run(tmp_path / "theirs", replace(CONFIG, plan="theirs.json"), BASE + 0.6)
    [contest], _ = gather([tmp_path])
    [(budget, runs)] = contest.budgets.items()
    assert budget == "100700B" and [run.folder.name for run in runs] == ["own", "theirs"]
    assert contest.behind_best(runs[1]) is not None
    data = json.loads((own / "evaluation.json").read_text())
    data["rows"][0]["bytes"] = 101_000  # one per cent more
    (own / "evaluation.json").write_text(json.dumps(data))
    [contest], _ = gather([tmp_path])
    assert set(contest.budgets) == {"100700B", "3bits"}


def test_what_has_not_finished_is_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "sweep" / "spqe" / "done", CONFIG, BASE + 0.5)
    going = make_run(tmp_path / "sweep" / "spqe" / "going", CONFIG, BASE + 0.5)
    (going / "evaluation.json").unlink()
    (tmp_path / "impq.toml").write_text("")  # a user's own configuration beside the runs makes no run
    [contest], notes = gather([tmp_path])
    assert [one.folder.name for one in contest.contestants] == ["done"]
    assert notes == ("going has not finished: it is left out",)
    with pytest.raises(ImpqError, match="going holds no finished run"):
        gather([going])
    with pytest.raises(ImpqError, match="nowhere: no such folder"):
        gather([tmp_path / "nowhere"])


@pytest.mark.parametrize("name, content", [
    ("evaluation.json", "{"), ("evaluation.json", "[]"), ("evaluation.json", '{"text": "t", "tokens": 1, "rows": []}'),
    ("evaluation.json", '{"text": "t", "tokens": 1, "rows": [{"name": "plan", "bytes": 1, "window_nll": ["x"]}]}'),
    ("plan.json", "{"), ("plan.json", '{"budget_bytes": 1, "bits_nominal": 3, "layers": {"a": {"bit": 4}}}'),
    ("plan.json", '{"budget_bytes": 1, "bits_nominal": null, "layers": {}}'), ("cost.json", "{}"),
    ("estimate.npz", "no zip"), ("measurements.npz", ""), ("provenance.json", "nothing"), ("impq.toml", "model = 3")])
def test_a_broken_file_is_one_line(name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "a", CONFIG, BASE + 0.5, planted_estimate(0, 4))
    (folder / name).write_text(content)
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path), "--no-html"])
    error_output = capsys.readouterr().err
    assert error_output.count("\n") == 1 and str(folder / name) in error_output and "bug of impq" not in error_output


BROKEN = {"evaluation.json": '{"text": "t", "tokens": 1, "rows": []}', "plan.json": "{", "cost.json": "{}",
          "estimate.npz": "no zip", "impq.toml": "seed = -1"}


def test_a_broken_run_is_left_out_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "good", CONFIG, BASE + 0.5)
    for name, content in BROKEN.items():
        folder = make_run(tmp_path / f"broken-{name}", CONFIG, BASE + 0.5, planted_estimate(0, 4))
        (folder / name).write_text(content)
    main(["compare", str(tmp_path), "--no-html"])
    said = capsys.readouterr()
    assert "spqe" in said.out and len(said.err.splitlines()) == len(BROKEN)
    for name in BROKEN:
        assert str(tmp_path / f"broken-{name}") in said.err
    assert said.err.count("the run is left out") == len(BROKEN)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reference", ["unquantized", "uniform 2", "first/last high"])
def test_a_reference_that_is_no_number_stops_nothing(value: float, reference: str, tmp_path: Path) -> None:
    make_run(tmp_path / "good", CONFIG, BASE + 0.5)
    file = make_run(tmp_path / "odd", CONFIG, BASE + 0.6) / "evaluation.json"
    evaluation = json.loads(file.read_text())
    for row in evaluation["rows"]:
        if row["name"] in (reference, "line low-high"):  # as a run writes it
            row["nll"] = None
            if "window_nll" in row:
                row |= {"window_nll": [value] * WINDOWS, "kl": None}
    file.write_text(json.dumps(evaluation))
    contests, notes = gather([tmp_path])
    assert not notes and sum(len(contest.contestants) for contest in contests) == 2
    Page(render(contests))


def test_the_page_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    estimate = planted_estimate(1, 6, strength=0.1)
    stderr = np.full_like(estimate.linear, 0.01)
    for name in ("<b>x", "$a$ & 'y'"):  # alike but for their folders, so that these are named
        make_run(tmp_path / "runs" / name, replace(CONFIG, model="org/<i>m"), BASE + 0.5,
                 replace(estimate, stderr=stderr, method="<script>1"))
    folder = tmp_path / "runs" / "<b>x"
    (folder / "provenance.json").write_text(json.dumps({"versions": {"<u>": 1}, "digests": {"evaluation": "ab12"}}))
    page = tmp_path / "page.html"
    main(["compare", str(tmp_path / "runs"), "--html", str(page)])
    text = page.read_text()
    parsed = Page(text)
    assert not {"script", "link", "b", "i", "u"} & set(parsed.seen) and parsed.seen.count("table") == 2
    # Sizes, sensitivities, interactions: one budget has no curve, one cost no figure, and nothing converged.
    assert parsed.seen.count("figure") == 3 and "convergence" not in text
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in parsed.references)
    assert "&lt;b&gt;x" in text and "ab12" in text and "http" not in text.replace("http-equiv", "")


def test_a_page_is_written_whole_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "a", CONFIG, BASE + 0.5)
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "runs"), "--html", str(tmp_path / "none" / "page.html")])
    assert "none/page.html cannot be written" in capsys.readouterr().err


def test_a_real_run_and_its_convergence(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny_config, tracking_uri="none", surrogate="covariance", options={
        "estimator": {"permutations": 8}, "backend": {"grid": "min-max"}})
    result = run(config)
    monkeypatch.chdir(result.folder.parents[1])
    [contest], _ = gather(["runs"])
    [one] = contest.contestants
    assert one.plan.nll == result.evaluation.plan.nll and one.plan.stderr == result.evaluation.plan.stderr
    assert one.plan.nbytes == result.plan.nbytes and one.forwards == result.forwards
    for name in ("line low-high", "first/last high"):
        gap = one.plan.minus(one.evaluation.row(name))
        difference = result.evaluation.against_plan(result.evaluation.row(name))
        assert difference is not None and gap.mean == pytest.approx(-difference.mean)
        assert gap.stderr == pytest.approx(difference.stderr) and not math.isnan(gap.stderr)
    # By hand: the last point is the standard error over all four antithetic pairs.
    measurements = result.measurements
    assert measurements is not None and one.convergence.shape == (2, 3)
    values, replicates = measurements.marginals()
    draws = np.stack([values[replicates == r].mean(axis=0) for r in range(4)])
    assert one.convergence[0, -1] == measurements.forwards
    assert one.convergence[1, -1] == pytest.approx((draws.std(axis=0, ddof=1) / 2).mean())
    page = render([contest])
    assert "Convergence" in page and "Interactions" in page and Page(page).seen.count("figure") == 4


def test_measurements_that_are_no_permutations_converge_to_nothing(tmp_path: Path) -> None:
    estimate = planted_estimate(0, 4)
    folder = make_run(tmp_path / "a", CONFIG, BASE + 0.5, estimate)
    picks = np.array([[0, 0, 0, 0], [1, 1, 0, 0]])
    Measurements(estimate.space, picks, np.array([0.0, 0.2]), np.zeros(2), np.arange(2), np.zeros(2), 10, 3.0,
                 2.0).save(folder / "measurements.npz")
    [contest], _ = gather([folder])
    assert isinstance(contest, Contest) and contest.contestants[0].convergence.shape == (2, 0)


def test_comparing_imports_nothing_heavy(tmp_path: Path) -> None:
    make_run(tmp_path / "impq-runs" / "a", CONFIG, BASE + 0.5, planted_estimate(0, 4))
    script = "from impq_core.cli import main\nmain(sys.argv[1:])"
    for arguments, heavy in ((["compare", "--no-html"], []), (["compare"], ["jinja2", "matplotlib"])):
        assert loaded_after(script, (*HEAVY, "matplotlib", "jinja2"), tmp_path, *arguments) == heavy
    assert (tmp_path / "compare.html").is_file()
