"""What inspectors see of a real model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from impq_core.bank import Bank
from impq_core.blockwise import BlockwiseModel
from impq_core.errors import ImpqError
from impq_core.space import Choice, FloatArray, LinearSpec, SearchSpace
from impq_core.text import Windows

BATCH_TOKENS = 1024
"""Tokens of a backward pass: its logits are float32 and there twice."""


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

    @property
    def window_tokens(self) -> int:
        """Scored tokens of a window."""
        return self._text.ids.shape[1] - 1

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

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        """First-order changes (windows, n, m) of each window's loss; costs three forwards in all.

        No gradient of a weight is ever made: its inner product with a change D of the weight is that of the gradient
        of the linear's output with D x, token by token, which keeps the windows of a batch apart.
        """
        layers = self._bank.layers
        if at is None:
            self._bank.apply([None] * len(layers))
        else:
            shares = {choice: float(share) for choice, share in zip(self.space.choices, at, strict=True) if share}
            pinned = [pin.choice for pin in self.space.pinned]
            for layer in range(len(layers)):
                if layer < len(self.space):
                    self._bank.blend(layer, shares)
                else:
                    self._bank.switch(layer, pinned[layer - len(self.space)])
        ids = torch.from_numpy(np.asarray(self._text.ids))
        batches = torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1]))
        out = [self._slopes_of(batch) for batch in batches]
        self.forwards += 3
        return np.concatenate(out)

    def _slopes_of(self, ids: torch.Tensor) -> FloatArray:
        out = np.zeros((len(ids), *self.space.nbytes.shape))
        model, handles = self._runner.model, []

        def watch(layer: int, linear: LinearSpec) -> None:
            def forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                inputs = args[0].detach()
                stands = self._bank.module(linear).weight.float()

                def backward(grad: torch.Tensor) -> None:
                    for k, choice in enumerate(self.space.choices):
                        change = (self._bank.variant(linear, choice) - stands).to(inputs.dtype)
                        moved = (grad.float() * (inputs @ change.T).float()).flatten(1).sum(dim=1)
                        out[:, layer, k] += moved.double().numpy()

                output.register_hook(backward)  # type: ignore[no-untyped-call]
            handles.append(self._bank.module(linear).register_forward_hook(forward))

        def start(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.requires_grad_(True)  # no parameter asks for a gradient, so the graph has to begin here

        try:
            handles.append(model.get_input_embeddings().register_forward_hook(start))
            for layer, spec in enumerate(self.space.layers):
                for linear in spec.linears:
                    watch(layer, linear)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            (loss / (ids.shape[1] - 1)).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
        return out

    @property
    def _text(self) -> Windows:
        if self._windows is None:
            raise ImpqError("an estimator asked for activations or gradients without saying so in its 'needs'")
        return self._windows
