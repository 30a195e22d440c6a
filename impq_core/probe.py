"""What inspectors see of a real model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.nn import functional

from impq_core.bank import Bank
from impq_core.blockwise import BlockwiseModel
from impq_core.errors import ImpqError
from impq_core.space import Choice, LinearSpec, SearchSpace
from impq_core.text import Windows


class ModelProbe:
    """Implements ``impq_core.interfaces.Probe``.

    Args:
        space: the choices on play.
        bank: the variants and the unquantized weights.
        runner: the model.
        windows: calibration windows; None where nobody needs text.
    """

    def __init__(self, space: SearchSpace, bank: Bank, runner: BlockwiseModel, windows: Windows | None) -> None:
        self.space = space
        self._bank, self._runner, self._windows = bank, runner, windows
        self.forwards = 0.0

    def weight(self, linear: LinearSpec) -> torch.Tensor:
        """The unquantized weight (rows, columns), float32."""
        return self._bank.original(linear)

    def variant(self, linear: LinearSpec, choice: Choice) -> torch.Tensor:
        """The weight (rows, columns) at a choice, float32."""
        return self._bank.variant(linear, choice)

    def block_states(self) -> Iterator[tuple[int, list[torch.Tensor], list[torch.Tensor]]]:
        """Each block of the unquantized model with its input and output; costs one forward in all."""
        self._bank.apply([None] * len(self._bank.layers))
        hidden = self._runner.embed(self._text.ids)
        for index in range(len(self._runner)):
            output = self._runner.run(index, hidden)
            self.forwards += 1 / len(self._runner)
            yield index, hidden, output
            hidden = output

    def gradients(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Gradients of each window's mean loss at the unquantized weights; costs three forwards in all."""
        self._bank.apply([None] * len(self._bank.layers))
        modules = {spec.name: self._bank.module(spec) for layer in self.space.layers for spec in layer.linears}
        model = self._runner.model
        ids = torch.from_numpy(self._text.ids)
        try:
            for module in modules.values():
                module.weight.requires_grad_(True)
            for window in ids:
                logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
                loss = functional.cross_entropy(logits.float(), window[1:])
                grads = torch.autograd.grad(loss, [module.weight for module in modules.values()])
                self.forwards += 3 / len(ids)
                yield dict(zip(modules, (grad.float() for grad in grads), strict=True))
        finally:
            for module in modules.values():
                module.weight.requires_grad_(False)

    @property
    def _text(self) -> Windows:
        if self._windows is None:
            raise ImpqError("an estimator asked for activations or gradients without saying so in its 'needs'")
        return self._windows
