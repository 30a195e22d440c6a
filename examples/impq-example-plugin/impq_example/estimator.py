"""Scores layers by the squared quantization error of their weights; reads no text."""

from dataclasses import dataclass

import numpy as np
from impq_core.interfaces import Inspector, Probe
from impq_core.types import SensitivityEstimate


@dataclass(frozen=True)
class Options:
    """Options of example.

    Args:
        relative: divide by the squared size of the weights, so that small layers count as much as large ones.
    """

    relative: bool = True


class Example(Inspector):
    """The cost of a choice is the squared error of the layer's weights minus that of the widest choice. It ranks
    choices and is no loss.

    An ``Inspector`` reads weights, activations or gradients. A ``GameEstimator`` plays the game and returns its own
    estimate (``estimate(game, rng)``). A ``Sampler`` plays the game and returns the losses, which a surrogate fits
    (``sample(game, rng, drift)``).
    """

    Options = Options

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """Reads every weight at every choice; costs no forward."""
        space = probe.space
        costs = np.zeros((len(space), len(space.choices)))
        for i, layer in enumerate(space.layers):
            for linear in layer.linears:
                weight = probe.weight(linear)
                size = float(weight.square().sum()) if self.options.relative else 1.0
                for k, choice in enumerate(space.choices):
                    costs[i, k] += float((probe.variant(linear, choice) - weight).square().sum()) / size
        return SensitivityEstimate(space, costs - costs[:, :1], method="example", forwards=probe.forwards,
                                   is_loss=False)
