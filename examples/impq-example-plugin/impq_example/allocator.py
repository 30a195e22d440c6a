"""Demotes layers to the narrowest width, in the order of predicted loss per byte saved."""

import numpy as np
from impq_core.errors import ImpqError
from impq_core.interfaces import Allocator
from impq_core.types import Plan, SensitivityEstimate


class Example(Allocator):
    """From all-widest, demotes layers to the narrowest width in the order of predicted loss per byte until the plan
    fits. The order ignores widths between and pair terms."""

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """A plan within the budget; raises ImpqError if there is none."""
        space = estimate.space
        if space.low_bytes > budget_bytes:
            raise ImpqError(f"{budget_bytes} bytes are below the smallest plan, {space.low_bytes} bytes")
        pick = space.uniform(0)
        saved = space.nbytes[:, 0] - space.nbytes[:, -1]
        for layer in np.argsort(estimate.linear[:, -1] / np.maximum(saved, 1), kind="stable"):
            if space.bytes_of(pick) <= budget_bytes:
                break
            pick[layer] = len(space.choices) - 1
        return Plan(space, pick, budget_bytes, float(estimate.predict(pick)[0]), method="example")
