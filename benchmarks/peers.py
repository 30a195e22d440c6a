"""Plans of other tools beside impq's: the same bytes, the same quantizer, the same text.

Every tool chooses widths in an environment of its own, which the script makes, from the same calibration windows. Its
widths become a plan.json of impq, and impq's backend quantizes every plan: what differs is the choice of widths alone.
Beside each stands impq's plan of exactly its bytes, and the line between the uniform models. Rows are kept in a file of
JSON lines in kept/, so that a stopped benchmark continues.

``--anchor`` compares quantizers instead: auto-round's learned rounding with impq's backend, uniform models quantized in
sequence from the same windows, at equal bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bench, add_model, command, model_name, page_of, write
from keyed import Keyed, facts_of
from lines import KEPT
from peers_anchor import anchor_rows
from peers_environment import PEERS, Peer, ask
from peers_reading import checked
from peers_report import report

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError, UsageError, nearest
from impq_core.parts import Parts
from impq_core.results import Score
from impq_core.types import Plan, SensitivityEstimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--backend", default="gptq")
    parser.add_argument("--bits", default="2,3,4", help="the menu, whole bits")
    parser.add_argument("--budgets", default="2.5,3", help="nominal bits")
    parser.add_argument("--granularities", default="linear,group")
    parser.add_argument("--peers", default=",".join(name_of(peer) for peer in PEERS))
    parser.add_argument("--estimators", default=RunConfig().estimator,
                        help="of impq's plans; the first one's are made at the bytes of every peer's")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of all who choose widths")
    parser.add_argument("--calibration-windows", type=int, default=64, help="of the backend that quantizes")
    parser.add_argument("--evaluation-windows", type=int, default=24)
    parser.add_argument("--calibration", default="demo", help="a text")
    parser.add_argument("--evaluation", default="demo", help="a text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH",
                        help="an interpreter to use for a peer in place of an environment of the script's own")
    parser.add_argument("--anchor", default="", metavar="BITS", help="widths of learned rounding, such as 2,3")
    parser.add_argument("--anchor-steps", type=int, default=200, help="steps a block")
    parser.add_argument("--anchor-blocks", type=int, default=0, help="the first blocks alone; 0 for all")
    parser.add_argument("--output", help="name of the page in results/ [peers.md, with the model's name]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        peers = [peer_named(name) for name in given.peers.split(",") if name]
        run(given, peers, interpreters(given.python))
    except ImpqError as error:
        raise SystemExit(f"error: {error}") from None


def run(given: argparse.Namespace, peers: Sequence[Peer], pythons: Mapping[str, Path]) -> None:
    """Measure the rows that are not in the log, and write the report.

    Raises:
        ImpqError: a peer failed; the rows of the others are in the report.
    """
    config = RunConfig(
        tracking_uri="none", model=given.model, backend=given.backend, bits=tuple(given.bits.split(",")),
        granularity="linear", estimator=given.estimators.split(",")[0], probe_windows=given.windows,
        calibration=TextConfig(given.calibration, windows=given.calibration_windows, length=given.length),
        evaluation=TextConfig(given.evaluation, windows=given.evaluation_windows, length=given.length))
    page, bench = given.output or page_of("peers.md", given.model), Bench.build(config)
    assert bench.prepared.probed is not None
    kept = Keyed(KEPT / "peers.jsonl", {**facts_of(bench.prepared), "read": bench.prepared.probed.digest})
    folder = KEPT / "peers" / model_name(given.model)
    measured = anchor_rows(bench, given, folder, pythons, kept.rows()) if given.anchor else plan_rows(
        bench, config, given, peers, folder, pythons, kept.rows())
    try:
        for row in measured:
            kept.add(**row)
            print(f"{row['method']}, {row['granularity']} {row['budget']:g}: {np.mean(row['nll']):.4f}", flush=True)
    finally:
        write(page, report(kept.rows(), command(), given))


def plan_rows(bench: Bench, config: RunConfig, given: argparse.Namespace, peers: Sequence[Peer], folder: Path,
              pythons: Mapping[str, Path], done: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each plan that is not among those that are done."""
    budgets, failed = [float(budget) for budget in given.budgets.split(",")], list[str]()
    space, evaluator = bench.prepared.space, bench.evaluator
    plans = [row for row in done if not row["granularity"].startswith("anchor")]
    finished = {(row["method"], row["granularity"], row["budget"], row["at"], row["version"]) for row in plans}

    def row(method: str, granularity: str, budget: float, at: str, version: str, plan: Plan | None, score: Score,
            **facts: Any) -> dict[str, Any]:
        return {"method": method, "granularity": granularity, "budget": budget, "at": at, "version": version,
                "bytes": plan.nbytes if plan else None, "stored": space.bits_per_weight(plan.nbytes) if plan else 16.0,
                "nll": score.window_nll.tolist(), "kl": score_kl(score), "text": str(bench.prepared.evaluation),
                **facts}

    if ("unquantized", "", 16.0, "", "") not in finished:
        yield row("unquantized", "", 16.0, "", "", None, evaluator.score([None] * len(space)))
    for number, choice in enumerate(space.choices):
        if (f"uniform {choice}", "", choice.bits, "", "") not in finished:
            plan = Plan(space, pick := space.uniform(number), space.bytes_of(pick))
            yield row(f"uniform {choice}", "", choice.bits, "", "", plan, bench.score(plan))
    for granularity in given.granularities.split(","):
        theirs = {}
        for peer in (peer for peer in peers if peer.plans(granularity)):
            try:
                found = list(plans_of(bench, config, peer, granularity, budgets, folder, pythons.get(name_of(peer))))
            except ImpqError as error:  # the others' plans are worth having
                failed.append(str(error))
                print(f"error: {error}", flush=True)
                continue
            theirs |= {(peer.name, version, budget): (plan, facts) for budget, version, plan, facts in found}
        for (name, version, budget), (plan, facts) in theirs.items():
            if (name, granularity, budget, "", version) not in finished:
                yield row(name, granularity, budget, "", version, plan, bench.score(plan), **facts)
        for number, estimator in enumerate(given.estimators.split(",")):
            wanted = [("", "", budget, Budget.nominal(budget).resolve(space)) for budget in budgets]
            wanted += [(*key, plan.nbytes) for key, (plan, _) in theirs.items() if number == 0]
            wanted = [(at, version, budget, nbytes) for at, version, budget, nbytes in wanted
                      if (f"impq {estimator}", granularity, budget, at, version) not in finished]
            if not wanted:
                continue
            ours = replace(config, granularity=granularity, estimator=estimator)
            there, start = bench.at(ours), time.process_time()
            estimate, _ = there.estimate(ours)
            facts = {"passes": estimate.forwards * config.game_windows, "seconds": time.process_time() - start}
            for at, version, budget, nbytes in wanted:
                plan = ours_at(there, ours, estimate, nbytes, bench)
                yield row(f"impq {estimator}", granularity, budget, at, version, plan, bench.score(plan), **facts)
    if failed:
        raise ImpqError(f"no plans of some peers, run again to add them: {failed[0]}")


def ours_at(there: Bench, config: RunConfig, estimate: SensitivityEstimate, nbytes: int, bench: Bench) -> Plan:
    """impq's plan within a number of bytes, over single linears."""
    options = {"allocator": {"work_limit": 10.0}} if config.allocator == "qp" else {}
    allocator = Parts.build(replace(config, options=options), there.session.plugins).allocator
    widths, space = allocator.allocate(estimate, nbytes).widths(), bench.prepared.space
    pick = np.array([space.choices.index(widths[layer.name]) for layer in space.layers], dtype=np.int64)
    return Plan(space, pick, nbytes)


def plans_of(bench: Bench, config: RunConfig, peer: Peer, granularity: str, budgets: Sequence[float], folder: Path,
             python: Path | None) -> Iterator[tuple[float, str, Plan, dict[str, Any]]]:
    """Budget, version of the tool, plan and costs of each plan of a peer, over single linears; the plan.json is written
    to the folder and read from there."""
    space, probed = bench.prepared.space, bench.prepared.probed
    assert probed is not None
    linears = [linear for layer in space.layers for linear in layer.linears]
    widths = sorted(int(choice.bits) for choice in space.choices)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = folder / f"tokens-{probed.digest}.npy"
    np.save(tokens, probed.ids)
    groups = bench.at(replace(config, granularity=granularity)).prepared.space.layers
    tied = [names for group in groups if len(names := [linear.name for linear in group.linears]) > 1]
    job = {"model": str(bench.prepared.source.folder), "tokens": str(tokens), "widths": widths,
           "linears": [linear.name for linear in linears], "group_size": space.choices[0].group_size,
           "budgets": list(budgets), "tied": tied if peer.ties is None else [], "options": {}}
    answer = ask(peer, peer.script, job, folder, python)
    for budget in budgets:
        found = peer.read(answer["raw"][str(budget)], linears=job["linears"], widths=widths, budget=budget,
                          sizes={linear.name: linear.parameters for linear in linears})
        found = checked(found, job["linears"], widths, peer.name)
        menu = {int(choice.bits): number for number, choice in enumerate(space.choices)}
        pick = np.array([menu[found[linear.name]] for linear in linears], dtype=np.int64)
        file = folder / f"{name_of(peer)}-{granularity}-{budget:g}.plan.json"
        Plan(space, pick, space.bytes_of(pick), method=f"{peer.name} {answer['version']}").save(file)
        cost = answer["cost"]
        yield budget, answer["version"], Plan.load(file, space), {
            "passes": cost["forwards"] + 2 * cost["backwards"],
            "seconds": answer["processor_seconds"] + cost.get("earlier", 0)}


def score_kl(score: Score) -> list[float]:
    """The KL divergence of each window, nats per token."""
    assert score.window_kl is not None
    return [float(value) for value in score.window_kl]


def name_of(peer: Peer) -> str:
    """The name of a peer in options."""
    return peer.script.removesuffix("_search.py")


def peer_named(name: str) -> Peer:
    """The peer of a name; raises UsageError if there is none."""
    names = [name_of(peer) for peer in PEERS]
    if name not in names:
        raise UsageError(f"no peer '{name}'{nearest(name, names)}; there are {', '.join(names)}")
    return PEERS[names.index(name)]


def interpreters(given: Sequence[str]) -> dict[str, Path]:
    """The interpreters that the command line names, by the name of the peer.

    Raises:
        UsageError: one has no form PEER=PATH, names no peer, or is no file.
    """
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        if not Path(path).is_file():
            raise UsageError(f"--python {text}: give PEER=PATH, with the path of an interpreter")
        found[name_of(peer_named(name))] = Path(path)
    return found


if __name__ == "__main__":
    main()
