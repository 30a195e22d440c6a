"""The bytes of weights that a generated token reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from impq_core.interfaces import Form, Meter, Readings


class Traffic(Meter):
    """Stored bytes of the weights that a token reads on average. Where memory limits the speed of generation, the time
    of a token is these bytes over the bandwidth.

    A routed expert counts by the share of experts that the model's configuration gives a token, as if experts were
    chosen equally often, and an input embedding by one row. Keys, values, norms and biases are not counted.
    """

    cost = "traffic"
    unit = "bytes"

    def read(self, forms: Sequence[Form], dtype: str, progress: Callable[[int, int], None]) -> Readings:
        """The bytes of each form; they are exact."""
        values = np.array([sum(stored.nbytes * stored.reads for stored in form.linears) for form in forms])
        shares = {stored.reads for form in forms for stored in form.linears if form.layer.block >= 0}
        notes = [f"a routed expert counts {share:.4g} times, chosen as often as others" for share in sorted(shares)
                 if share < 1]
        return Readings(values, notes=tuple(notes))
