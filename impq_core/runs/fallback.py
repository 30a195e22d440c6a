"""The uniform model in place of a plan that does not beat it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from impq_core.evaluate import ScoreLog
from impq_core.runs.folder import RunFolder
from impq_core.runs.session import HELD_BACK, Session
from impq_core.types import Plan, SensitivityEstimate
from impq_core.uniform_test import UniformTest, uniform_within


def against_uniform(session: Session, folder: RunFolder, plan: Plan,
                    estimate: SensitivityEstimate) -> tuple[Plan, UniformTest | None]:
    """Measure an estimated plan and the largest uniform model within its budget on the run's held-back windows, and
    take the uniform model if ``UniformTest.replaces``.

    Args:
        session: the model with the deployed variants.
        folder: of the run: scores, test and plan are written to it, and earlier scores are read from it.
        plan: the estimated plan.
        estimate: that the plan was made from.

    Returns:
        The plan that the run goes on with; and the test, None if there is nothing to test: no windows are held back, no
        uniform model is within the budget, or the plan is that model.
    """
    prepared, text, uniform = session.prepared, session.prepared.held_back, uniform_within(plan)
    if text is None or uniform is None:
        return plan, None
    with session.clock.stage("fallback"), closing(ScoreLog(folder.held_back_scores, prepared.held_back_key)) as log:
        scores = session.evaluator(log, HELD_BACK).scores(
            [plan.space.assignment(pick) for pick in (plan.pick, uniform)], session.report("fallback"))
    value = prepared.config.value
    of_plan, of_uniform = (score.window_nll if value == "nll" else score.window_kl for score in scores)
    assert of_plan is not None and of_uniform is not None
    # As in the game, a text of a mixture counts by its windows, however many of their tokens are scored.
    weights = None if text.weights is None else text.weights.mean(axis=1)
    test = UniformTest.of(plan, uniform, (of_plan, of_uniform), weights, value, text.scored_tokens)
    folder.write_json(folder.uniform_test, test.to_dict())
    if test.replaces:
        plan.save(folder.estimated_plan)
        predicted = float(estimate.on(plan.space).predict(uniform)[0])
        plan = replace(plan, pick=uniform, predicted_loss=predicted, bound=None, method=f"uniform {test.uniform}",
                       provenance={**plan.provenance, "in_place_of": {"method": plan.method, **test.to_dict()}})
        plan = replace(plan, file_bytes=prepared.promise(plan))
        plan.save(folder.plan)
        session.plugins.notify("impq_plan_ready", plan=plan)
    return plan, test
