"""Documents of runs: plans, estimates, held-out scores, exports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from impq_core.config import RunConfig
from impq_core.documents.base import Document, plain
from impq_core.exports.manifest import exports_in, read_manifest
from impq_core.results import Evaluation, Exported, Row, RunResult, Score
from impq_core.runs.folder import recorded
from impq_core.space import Choice, LayerSpec, SearchSpace
from impq_core.types import Plan, SensitivityEstimate
from impq_core.uniform_test import UniformTest


@dataclass(frozen=True)
class ScoreDocument:
    """A held-out score.

    Args:
        nll_nats: mean negative log-likelihood, nats per token.
        nll_stderr_nats: its standard error over windows.
        perplexity: exp of it.
        perplexity_stderr: its standard error, by the delta method.
        kl_nats: mean divergence from the unquantized model's next-token distribution, nats per token.
        top1_share: share of tokens for which the most likely successor is the unquantized model's.
    """

    nll_nats: float | None
    nll_stderr_nats: float | None
    perplexity: float | None
    perplexity_stderr: float | None
    kl_nats: float | None
    top1_share: float | None

    @classmethod
    def of(cls, score: Score) -> ScoreDocument:
        """The document of a score."""
        return cls(score.nll, score.stderr, score.perplexity, score.perplexity_stderr, score.kl, score.top1)


@dataclass(frozen=True)
class RowDocument:
    """An allocation in the held-out table.

    Args:
        allocation: ``plan``, ``unquantized``, ``uniform 3``, ``random 1`` ...
        size_bytes: stored bytes of the quantizable weights; null for the unquantized model.
        bits_nominal, bits_stored: nominal and stored bits a weight; null for the unquantized model.
        nll_nats, nll_stderr_nats: mean negative log-likelihood and its standard error over windows.
        minus_plan_nats, minus_plan_stderr_nats: its loss minus the plan's and the standard error of that, paired over
            windows; null for the plan.
        perplexity, perplexity_stderr, kl_nats, top1_share: as in a score; null for a loss that is interpolated between
            uniform models, but for the perplexity.
        window_nll_nats: loss of each window; null for an interpolated loss.
        costs: what the run's meters give it beside bytes, by name of the cost, in the units of the evaluation.
    """

    allocation: str
    size_bytes: int | None
    bits_nominal: float | None
    bits_stored: float | None
    nll_nats: float | None
    nll_stderr_nats: float | None
    minus_plan_nats: float | None
    minus_plan_stderr_nats: float | None
    perplexity: float | None
    perplexity_stderr: float | None
    kl_nats: float | None
    top1_share: float | None
    window_nll_nats: list[float | None] | None
    costs: dict[str, float]

    @classmethod
    def of(cls, row: Row, evaluation: Evaluation) -> RowDocument:
        """The document of a row of an evaluation."""
        minus = evaluation.against_plan(row)
        score = ScoreDocument.of(row.score or Score(row.window_nll, float("nan"), float("nan")))
        measured = row.score is not None
        return cls(row.name, row.nbytes, row.bits_nominal, row.bits_stored, row.nll, row.stderr,
                   minus.mean if minus else None, minus.stderr if minus else None, score.perplexity,
                   score.perplexity_stderr, score.kl_nats if measured else None,
                   score.top1_share if measured else None, row.window_nll.tolist() if measured else None,
                   dict(row.costs))


@dataclass(frozen=True)
class EvaluationDocument:
    """The plan and its references on a held-out text.

    Args:
        name: of the text among several; empty if there is one.
        text: description of the text.
        tokens: scored tokens.
        sequential: whether plan and references were quantized in sequence, as an export is.
        costs: unit of each cost of the rows, by its name.
        rows: the plan first.
    """

    name: str
    text: str
    tokens: int
    sequential: bool
    costs: dict[str, str]
    rows: list[RowDocument]

    @classmethod
    def of(cls, evaluation: Evaluation) -> EvaluationDocument:
        """The document of an evaluation."""
        return cls(evaluation.name, evaluation.text, evaluation.tokens, evaluation.sequential, dict(evaluation.costs),
                   [RowDocument.of(row, evaluation) for row in evaluation.rows])


@dataclass(frozen=True)
class LayerDocument:
    """A layer of a plan.

    Args:
        layer: its name.
        block: number of its block; -1 for an embedding, the number of blocks for a head.
        choice: what it is stored as: ``3``, ``3@128``, ``Q4_K``; null if it stays unquantized.
        bits: nominal bits a weight; null if it stays unquantized.
        group_size: weights that share a scale, 0 for a whole row; null if it stays unquantized.
        weights: number of its weights.
        size_bytes: its stored bytes.
        fixed: whether it was no choice of the plan: a pin, an excluded layer or a shape that cannot be quantized.
        linears: names of its modules.
    """

    layer: str
    block: int
    choice: str | None
    bits: float | None
    group_size: int | None
    weights: int
    size_bytes: int
    fixed: bool
    linears: list[str]

    @classmethod
    def of(cls, layer: LayerSpec, choice: Choice | None, nbytes: int, bits: float | None, fixed: bool) -> LayerDocument:
        """The document of a layer at a choice."""
        return cls(layer.name, layer.block, choice.name if choice else None, bits,
                   choice.group_size if choice else None, layer.parameters, nbytes, fixed,
                   [linear.name for linear in layer.linears])


@dataclass(frozen=True)
class PlanDocument(Document):
    """A width for every layer.

    Args:
        file: its file; null if it has none.
        method: what made it.
        size_bytes: stored bytes of the quantizable weights, scales and zeros included.
        budget_bytes: what it had to fit in.
        file_bytes: the most bytes of the file of an export; null if the budget did not bound it.
        bits_nominal, bits_stored: nominal and stored bits a weight, on average.
        predicted: the estimate's prediction, nats per token above the widest plan if ``predicted_is_nats``; null
            if nothing was predicted.
        bound: proven lower bound of the prediction of any plan of the budget; null if nothing was proven.
        predicted_is_nats: whether the prediction is a loss; else a score that only ranks.
        costs: what meters give it beside bytes, by name of the cost.
        layers: every layer, in the order of the search space, then the fixed ones.
    """

    kind = "plan"

    file: str | None
    method: str
    size_bytes: int
    budget_bytes: int
    file_bytes: int | None
    bits_nominal: float
    bits_stored: float
    predicted: float | None
    bound: float | None
    predicted_is_nats: bool
    costs: dict[str, float]
    layers: list[LayerDocument]

    @classmethod
    def of(cls, plan: Plan, file: Path | None = None) -> PlanDocument:
        """The document of a plan, and of its file."""
        space = plan.space
        layers = [LayerDocument.of(layer, space.choices[k], int(space.nbytes[i, k]), float(space.bits[i, k]), False)
                  for i, (layer, k) in enumerate(zip(space.layers, plan.pick.tolist(), strict=True))]
        layers += [LayerDocument.of(pin.layer, pin.choice, pin.nbytes, pin.choice.bits if pin.choice else None, True)
                   for pin in space.pinned]
        return cls(str(file) if file else None, plan.method, plan.nbytes, plan.budget_bytes, plan.file_bytes,
                   space.nominal_bits(plan.nbytes), space.bits_per_weight(plan.nbytes), plan.predicted_loss, plan.bound,
                   plan.is_loss, {cost.name: float(cost.of(plan.pick)) for cost in plan.costs}, layers)


@dataclass(frozen=True)
class CostDocument:
    """The predicted cost of a layer at a choice, with every other layer at its widest.

    Args:
        layer: name of the layer.
        block: number of its block.
        choice: name of the choice.
        bits: its nominal bits a weight.
        size_bytes: stored bytes of the layer there.
        cost: nats per token if ``is_nats`` of the estimate, else a score that only ranks.
        cost_stderr: standard error of the measured part; null if it is unknown.
    """

    layer: str
    block: int
    choice: str
    bits: float
    size_bytes: int
    cost: float | None
    cost_stderr: float | None


@dataclass(frozen=True)
class EstimateDocument:
    """The estimate that a plan was made from. Its pair terms are in ``estimate.npz`` alone.

    Args:
        method: how it was made.
        forwards: what it cost, in full-model forwards.
        is_nats: whether costs are losses in nats per token; else they are scores that only rank.
        has_pairs: whether it has terms of pairs of layers.
        costs: a cost for each layer and choice; that of the widest choice is 0.
    """

    method: str
    forwards: float
    is_nats: bool
    has_pairs: bool
    costs: list[CostDocument]

    @classmethod
    def of(cls, estimate: SensitivityEstimate) -> EstimateDocument:
        """The document of an estimate."""
        space, stderr = estimate.space, estimate.stderr
        costs = [CostDocument(layer.name, layer.block, choice.name, float(space.bits[i, k]), int(space.nbytes[i, k]),
                              float(estimate.linear[i, k]), None if stderr is None else float(stderr[i, k]))
                 for i, layer in enumerate(space.layers) for k, choice in enumerate(space.choices)]
        return cls(estimate.method, estimate.forwards, estimate.is_loss and estimate.link is None,
                   estimate.pairwise is not None, costs)


@dataclass(frozen=True)
class CheckpointDocument(Document):
    """An exported folder.

    Args:
        folder: the folder.
        format: name of the format.
        size_bytes: stored bytes of the quantized weights.
        file_bytes: bytes of the file of the model, embeddings and head included; 0 for a recipe; null if an impq
            before 0.6 wrote it.
        text: description of the held-out text.
        score: held-out score of the model in it; null for a recipe, which holds no model.
    """

    kind = "checkpoint"

    folder: str
    format: str
    size_bytes: int | None
    file_bytes: int | None
    text: str
    score: ScoreDocument | None

    @classmethod
    def of(cls, exported: Exported) -> CheckpointDocument:
        """The document of an exported folder."""
        return cls(str(exported.folder), exported.format, exported.nbytes, exported.file_bytes, exported.text,
                   ScoreDocument.of(exported.score) if exported.score else None)

    @classmethod
    def read(cls, folder: Path) -> CheckpointDocument:
        """The document of an exported folder, from its manifest; raises ImpqError if there is none."""
        manifest = read_manifest(folder)
        score = manifest.get("score")
        numbers = None if not score else ScoreDocument(
            score["nll"], score["nll_stderr"], score["perplexity"], score["perplexity"] * score["nll_stderr"],
            score["kl"], score["top1_agreement"])
        return cls(str(folder), manifest["exporter"], manifest.get("bytes"), manifest.get("file_bytes"),
                   str(manifest.get("text", "")), numbers)


@dataclass(frozen=True)
class UniformTestDocument:
    """The estimated plan against the largest uniform model within its budget, on calibration windows that neither game
    nor gradients read.

    Args:
        uniform: name of the choice of the uniform model.
        uniform_bytes, plan_bytes: stored bytes of both.
        minus_uniform_nats: the estimated plan's loss minus the uniform model's; null if a loss is not finite.
        minus_uniform_stderr_nats: its standard error, paired over windows; null if unknown.
        value: the loss: ``nll`` or ``kl``.
        tokens: scored tokens.
        windows: of these tokens; 0 in runs of versions before 0.9.
        replaces: whether the uniform model is the run's plan.
    """

    uniform: str
    uniform_bytes: int
    plan_bytes: int
    minus_uniform_nats: float | None
    minus_uniform_stderr_nats: float | None
    value: str
    tokens: int
    windows: int
    replaces: bool

    @classmethod
    def of(cls, test: UniformTest) -> UniformTestDocument:
        """The document of a test."""
        return cls(test.uniform, test.uniform_bytes, test.plan_bytes, test.minus_uniform, test.stderr, test.value,
                   test.tokens, test.windows, test.replaces)


@dataclass(frozen=True)
class RunDocument(Document):
    """A run.

    Args:
        folder: its folder.
        state: ``finished``, ``estimated`` (there is an estimate and no plan), ``planned`` (there is a plan, without
            held-out scores) or ``unfinished`` (there is no estimate).
        error: the last line of the error that ended the run; null if none did.
        configuration: the resolved configuration: the keys of impq.toml.
        layers: number of layers that play.
        weights: number of quantizable weights.
        choices: names of the menu, widest first.
        plan: null if there is none yet.
        uniform_test: null if the plan was not tested against a uniform model.
        estimate: null if there is none: the plan was given, or the run is unfinished.
        evaluation: on the first held-out text; null if there is none yet.
        further_evaluations: on the other held-out texts.
        measured_loss_nats: the plan's loss in the game that it was estimated from, above the widest plan; null if
            unknown.
        losses: number of losses that the estimate was fitted to; null if it was fitted to none.
        forwards: cost of the search in full-model forwards; null if it has not ended.
        seconds: by stage.
        rest_bytes: bytes of what is in no layer: norms; embeddings and head unless they are layers; null if unknown.
        exports: the exported folders in the run's folder.
    """

    kind = "run"

    folder: str
    state: str
    error: str | None
    configuration: dict[str, Any]
    layers: int
    weights: int
    choices: list[str]
    plan: PlanDocument | None
    uniform_test: UniformTestDocument | None
    estimate: EstimateDocument | None
    evaluation: EvaluationDocument | None
    further_evaluations: list[EvaluationDocument]
    measured_loss_nats: float | None
    losses: int | None
    forwards: float | None
    seconds: dict[str, float]
    rest_bytes: int | None
    exports: list[CheckpointDocument]

    @classmethod
    def of(cls, result: RunResult, error: str | None = None) -> RunDocument:
        """The document of a run, and of what was exported from it."""
        known = result.plan or result.estimate
        assert known is not None
        space = known.space
        return cls(str(result.folder), result.state, error, settings_of(result.config), len(space), space.parameters,
                   [choice.name for choice in space.choices],
                   PlanDocument.of(result.plan, result.folder / "plan.json") if result.plan else None,
                   UniformTestDocument.of(result.uniform_test) if result.uniform_test else None,
                   EstimateDocument.of(result.estimate) if result.estimate else None,
                   EvaluationDocument.of(result.evaluation) if result.evaluation else None,
                   list(map(EvaluationDocument.of, result.evaluation.others if result.evaluation else ())),
                   result.measured_loss, len(result.measurements) if result.measurements is not None else None,
                   result.forwards, result.seconds, result.rest_bytes,
                   [CheckpointDocument.read(folder) for folder in exports_in(result.folder)])


    @classmethod
    def unfinished(cls, folder: Path, config: RunConfig, space: SearchSpace, error: str | None) -> RunDocument:
        """The document of a run that has no estimate and no plan yet."""
        return cls(str(folder), "unfinished", error, settings_of(config), len(space), space.parameters,
                   [choice.name for choice in space.choices], None, None, None, None, [], None, None, None, {}, None,
                   [])


def settings_of(config: RunConfig) -> dict[str, Any]:
    """A configuration as files hold it: without passwords."""
    settings: dict[str, Any] = plain(asdict(recorded(config)))
    return settings
