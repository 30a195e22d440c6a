"""Sends whole layers to the narrowest width, those first that lose least for the bytes they free."""

import numpy as np
from impq_core.errors import ImpqError
from impq_core.interfaces import Allocator
from impq_core.types import Plan, SensitivityEstimate


class Example(Allocator):
    """From all-widest, layers go down in the order of predicted loss a byte until the plan fits; widths between and
    pair terms play no part in the choice."""

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """A plan within the budget; raises ImpqError where there is none."""
        space = estimate.space
        if space.low_bytes > budget_bytes:
            raise ImpqError(f"{budget_bytes} bytes are below the smallest plan, {space.low_bytes} bytes")
        pick = space.uniform(0)
        freed = space.nbytes[:, 0] - space.nbytes[:, -1]
        for layer in np.argsort(estimate.linear[:, -1] / np.maximum(freed, 1), kind="stable"):
            if space.bytes_of(pick) <= budget_bytes:
                break
            pick[layer] = len(space.choices) - 1
        return Plan(space, pick, budget_bytes, float(estimate.predict(pick)[0]), method="example")
