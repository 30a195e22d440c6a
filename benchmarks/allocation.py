"""Scaling of the quadratic program: the allocator ``qp``, local search alone, HiGHS on the whole program, and SCIP.

The programs are random by default. With ``--measured`` they are the interaction matrices of ``fisher`` at three points
of the real model, over single linears at 2, 3 and 4 bits, for all layers and for the first layers only.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import Bench, heading, table, write
from impq_qp.local import search
from impq_qp.program import Options, QuadraticProgram
from impq_spqe.sampler import Options as SpqeOptions
from impq_spqe.sampler import Spqe
from impq_surrogates.shapley import Covariance

from impq_core.config import RunConfig
from impq_core.space import FloatArray, IntArray
from impq_core.testing import PlantedGame, least_loss, planted_space
from impq_core.types import Plan, SensitivityEstimate

WORK = Path(__file__).parent / "kept" / "allocation"
POINTS = (0.25, 0.5, 1.0)
"""Points of the path from all-widest to all-narrowest at which ``fisher`` takes gradients."""
SIZES = (16, 32, 64, 100, 224)
MENUS = ((4.0, 2.0), (4.0, 3.0, 2.0))
COUPLINGS = {"moderate": 1.0, "strong": 5.0}
MOST_PRODUCTS = 30_000
HEADER = ("pairs", "coupling", "layers", "widths", "qp s", "qp gap %", "exhaustive", "local s", "local worse by %",
          "paper gap %", "compact gap %", "SCIP gap %", "SCIP worse by %")


def random_estimate(seed: int, n: int, bits: tuple[float, ...], gram: bool, coupling: float) -> SensitivityEstimate:
    """A random estimate with exponential cost steps. With ``gram``, the pair terms are a Gram matrix of normal vectors,
    otherwise a symmetric normal matrix; terms within a layer are 0. The mean absolute row sum of the pair terms is
    ``coupling`` times the standard deviation of the linear terms."""
    rng = np.random.default_rng(seed)
    m, size = len(bits), n * (len(bits) - 1)
    linear = np.pad(rng.exponential(0.5, (n, m - 1)).cumsum(axis=1), ((0, 0), (1, 0)))
    factors = rng.normal(size=(size, size))
    matrix = factors @ factors.T if gram else factors + factors.T
    matrix *= 1 - np.kron(np.eye(n), np.ones((m - 1, m - 1)))
    matrix *= coupling * linear[:, 1:].std() / np.abs(matrix).sum(axis=1).mean()
    pairs = np.zeros((n, m, n, m))
    pairs[:, 1:, :, 1:] = matrix.reshape(n, m - 1, n, m - 1)
    return SensitivityEstimate(planted_space(n, bits), linear, pairs)


def planted_covariance(seed: int, n: int, permutations: int) -> SensitivityEstimate:
    """The estimate of SPQE and the paper's covariance for a saturating game with noise, similar to a measured one."""
    rng = np.random.default_rng(seed)
    costs = np.pad(0.02 * rng.exponential(1.0, (n, 2)).cumsum(axis=1), ((0, 0), (1, 0)))
    directions = 0.02 * rng.normal(size=(n, 8))

    def loss(pick: IntArray) -> float:
        return float(3.0 + np.log1p(costs[np.arange(n), pick].sum()) + ((pick @ directions) ** 2).sum())

    game = PlantedGame(planted_space(n, MENUS[1]), loss, noise=0.002)
    return Covariance().fit(Spqe(SpqeOptions(permutations=permutations)).sample(game, np.random.default_rng(seed)))


def first(estimate: SensitivityEstimate, n: int) -> SensitivityEstimate:
    """The estimate of the first n layers, with the other layers at their widest choices."""
    space = replace(estimate.space, layers=estimate.space.layers[:n], nbytes=estimate.space.nbytes[:n], pinned=())
    pairs = None if estimate.pairwise is None else estimate.pairwise[:n, :, :n]
    return SensitivityEstimate(space, estimate.linear[:n], pairs, link=estimate.link)


def random_instances() -> Iterator[tuple[str, str, SensitivityEstimate]]:
    for name, coupling in COUPLINGS.items():
        sizes = SIZES if name == "moderate" else SIZES[::2]
        for n, bits, gram in itertools.product(sizes, MENUS if name == "moderate" else MENUS[1:], (True, False)):
            yield "Gram" if gram else "either sign", name, random_estimate(n, n, bits, gram, coupling)
    for permutations in (2, 4):
        yield f"covariance of {permutations} planted", "", planted_covariance(0, 210, permutations)


def measured_estimates(work: Path) -> dict[str, SensitivityEstimate]:
    """The estimates of ``fisher`` at ``POINTS``, made once on all calibration windows and kept in a folder."""
    files = {f"fisher at {at:g}": work / f"fisher-{at:g}.npz" for at in POINTS}
    if not all(file.exists() for file in files.values()):
        config = RunConfig(tracking_uri="none", backend="gptq", bits=(2.0, 3.0, 4.0), granularity="linear")
        bench = Bench.build(config)
        work.mkdir(parents=True, exist_ok=True)
        for at, file in zip(POINTS, files.values(), strict=True):
            estimate, _ = bench.estimate(replace(config, estimator="fisher", options={"estimator": {"at": at}}))
            estimate.save(file)
    return {name: SensitivityEstimate.load(file) for name, file in files.items()}


def measured_instances(work: Path) -> Iterator[tuple[str, str, SensitivityEstimate]]:
    for name, estimate in measured_estimates(work).items():
        for n in sorted({*(n for n in SIZES if n < len(estimate.space)), len(estimate.space)}):
            yield name, "measured", first(estimate, n)


def scip(estimate: SensitivityEstimate, budget: int, seconds: float) -> tuple[float | None, float]:
    """The score of SCIP's best pick and its bound: binaries, and one quadratic constraint for the pair terms."""
    import pyscipopt

    space = estimate.space
    n, m = space.nbytes.shape
    keys = [(i, k) for i in range(n) for k in range(1, m)]
    model = pyscipopt.Model()
    model.hideOutput()
    model.setParam("limits/time", seconds)
    x = {key: model.addVar(vtype="B") for key in keys}
    for i in range(n):
        model.addCons(pyscipopt.quicksum(x[i, k] for k in range(1, m)) <= 1)
    model.addCons(pyscipopt.quicksum(float(space.nbytes[i, 0] - space.nbytes[i, k]) * x[i, k] for i, k in keys)
                  >= space.high_bytes - budget)
    objective = pyscipopt.quicksum(float(estimate.linear[key]) * x[key] for key in keys)
    if estimate.pairwise is not None:
        pairs = model.addVar(lb=None)
        model.addCons(pairs >= pyscipopt.quicksum(
            float(estimate.pairwise[*a, *b]) * x[a] * x[b] for a, b in itertools.combinations(keys, 2)
            if estimate.pairwise[*a, *b]))
        objective += pairs
    model.setObjective(objective)
    model.optimize()
    pick: FloatArray | None = None
    if model.getNSols():
        pick = np.zeros(n)
        for i, k in keys:
            pick[i] += k * (model.getVal(x[i, k]) > 0.5)
    return None if pick is None else float(estimate.score(pick.astype(np.int64))[0]), float(model.getDualbound())


def row(kind: str, coupling: str, estimate: SensitivityEstimate, limit: float, losers: float) -> list[str]:
    space = estimate.space
    n, m = space.nbytes.shape
    budget = (space.low_bytes + space.high_bytes) // 2
    estimate = replace(estimate, link=None)  # gaps are of the score, the objective of the program

    def plan(options: Options) -> Plan:
        return QuadraticProgram(options).allocate(estimate, budget)

    start = time.perf_counter()
    best = plan(Options(work_limit=limit))
    seconds = time.perf_counter() - start
    value = best.predicted_loss
    assert value is not None

    def share(difference: float | None) -> str:
        if difference is None or not abs(difference) < 1e15:  # SCIP's infinity is 1e20
            return "none"
        return f"{round(100 * difference / abs(value), 4) + 0.0:.3g}"

    start = time.perf_counter()
    local_score = float(estimate.score(search(estimate, budget, Options().starts, np.random.default_rng(0)))[0])
    local_seconds = time.perf_counter() - start
    highs_gaps = []
    for form in ("paper", "compact"):
        if form == "paper" and (n * (m - 1)) ** 2 / 2 > MOST_PRODUCTS:
            highs_gaps.append("too large")
            continue
        bound = plan(Options(time_limit=losers, linearization=form, starts=1)).bound
        highs_gaps.append(share(None if bound is None else value - bound))
    try:
        scip_score, scip_bound = scip(estimate, budget, losers)
        scip_cells = [share(value - scip_bound), share(None if scip_score is None else scip_score - value)]
    except ImportError:
        scip_cells = ["not installed", ""]
    excess = share(value - least_loss(estimate, budget)) if m**n <= 100_000 else ""
    return [kind, coupling, str(n), str(m), f"{seconds:.1f}", share(best.gap), excess, f"{local_seconds:.1f}",
            share(local_score - value), *highs_gaps, *scip_cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", action="store_true", help="matrices of the real model, in place of random ones")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the measured matrices")
    parser.add_argument("--limit", type=float, default=60.0, help="qp's work_limit [60]")
    parser.add_argument("--losers", type=float, default=60.0, help="seconds for each of the others [60]")
    args = parser.parse_args()
    name = "allocation_measured.md" if args.measured else "allocation.md"
    command = "python benchmarks/allocation.py" + "".join(
        f" --{key} {value:g}" for key, value in (("limit", args.limit), ("losers", args.losers)) if value != 60)
    title = "Programs that scale" + (", on measured estimates" if args.measured else "")
    lines = heading(title, command + (" --measured" if args.measured else ""))
    lines += [f"The budget is midway between all-low and all-high. `qp` has a work limit of {args.limit:g} for "
              "its proof, in counted units. HiGHS on the whole program, in the paper's linearisation and in Glover's "
              f"compact one, has {args.losers:g} s after a local search, and so has SCIP on the quadratic program as "
              "it is. Gaps are the value of qp's plan minus the proven bound, in % of that value; a gap of 0.0001 "
              "counts as proven. *Worse by* is in % of it too. *Exhaustive* is the plan's value minus the optimum, if "
              f"the plans can be enumerated. The paper's form is not tried above {MOST_PRODUCTS:,} products.", ""]
    if not args.measured:
        lines += ["Random programs: the mean absolute row sum of the pair terms is 1 (moderate) or 5 (strong) standard "
                  "deviations of the linear terms; pair terms are a Gram matrix (positive semidefinite, but for the "
                  "blocks within layers) or normal and of either sign. *Planted* are covariances of SPQE's marginals "
                  "from that many permutations of a saturating game.", ""]
    else:
        lines += ["`fisher` on all 64 calibration windows, between GPTQ's variants of SmolLM2-135M's 210 linears.", ""]
    rows: list[list[str]] = []
    for kind, coupling, estimate in measured_instances(args.work) if args.measured else random_instances():
        rows.append(row(kind, coupling, estimate, args.limit, args.losers))
        print(*rows[-1], sep=" | ", flush=True)
    write(name, [*lines, *table(HEADER, rows)])


if __name__ == "__main__":
    main()
