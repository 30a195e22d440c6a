"""What inspectors see of a real model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from impq_core.errors import ImpqError
from impq_core.ledger import Ledger
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.text import Windows
from impq_core.space import Choice, FloatArray, LinearSpec, SearchSpace

BATCH_TOKENS = 1024
"""Tokens of a backward pass: its logits are float32 and there twice."""

STEP = 3e-3
"""Step of a difference of gradients, relative to the root mean square of a linear's own weights. On the tiny models of
the tests it comes within 0.001 of second derivatives, and steps from 0.0001 to 0.01 within 0.01; in bfloat16 none comes
within 0.08."""

Changes = Callable[[LinearSpec], Iterable[torch.Tensor]]
"""Changes (rows, columns) of a linear's weight, float32; made one at a time where they are an iterator."""


class ModelProbe:
    """Implements ``impq_core.interfaces.Probe``.

    Args:
        space: the choices on play.
        bank: the variants and the unquantized weights.
        runner: the model.
        windows: calibration windows; None where nobody needs text.
        value: the loss that has slopes: ``nll``, or ``kl`` to the unquantized model, which is flat where the model is
            unquantized, so that its slopes hold nothing of the chance that a text likes an error.
        game_windows: how many windows a forward is counted over; as many as there are by default.
        log: where slopes and traces go before they are returned, and where earlier ones come from; those cost what
            they did cost.
    """

    def __init__(self, space: SearchSpace, bank: Bank, runner: BlockwiseModel, windows: Windows | None,
                 value: str = "nll", game_windows: int = 0, log: Ledger | None = None) -> None:
        self.space = space
        self._log = log
        self._bank, self._runner, self._windows, self._value = bank, runner, windows, value
        self._unquantized: torch.Tensor | None = None
        self.forwards = 0.0
        self._unit = len(windows.ids) / (game_windows or len(windows.ids)) if windows else 1.0

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
            self.forwards += self._unit / len(self._runner)
            yield index, hidden, output
            hidden = output

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        """First-order changes (windows, n, m) of each window's loss; costs three forwards in all."""
        self._remember()
        shares = None if at is None else np.asarray(at, dtype=np.float64).tolist()
        return np.array(self._known("at", shares, 3 * self._unit, lambda: self._slopes(at).tolist()), dtype=np.float64)

    def _slopes(self, at: FloatArray | None) -> FloatArray:
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

        def ways(linear: LinearSpec) -> Iterator[torch.Tensor]:
            stands = self._bank.module(linear).weight.float()
            return (self._bank.variant(linear, choice) - stands for choice in self.space.choices)

        found = self._products(ways)
        return np.stack([np.sum([found[linear] for linear in spec.linears], axis=0) for spec in self.space.layers],
                        axis=1)

    def hessian_traces(self, rng: np.random.Generator) -> dict[LinearSpec, float]:
        """One draw of the trace of the loss's Hessian in each linear's weight; costs six forwards. Its signs come
        from a seed that ``rng`` gives.

        ``v' H v`` for one random sign vector v over all linears at once (Hutchinson; terms between linears have mean
        zero), with ``H v`` from slopes on either side of the weights, as attention may have no second derivative.
        """
        self._remember()
        linears = [linear for layer in self.space.layers for linear in layer.linears]
        draw = int(rng.integers(2**63))
        found = self._known("draw", draw, 6 * self._unit,
                            lambda: self._traces(linears, np.random.default_rng(draw)))
        return dict(zip(linears, found, strict=True))

    def _traces(self, linears: Sequence[LinearSpec], rng: np.random.Generator) -> list[float]:
        signs = {linear: torch.from_numpy(2 * rng.integers(0, 2, (linear.rows, linear.columns), dtype=np.int8) - 1)
                 for linear in linears}
        sizes = {linear: float(self._bank.original(linear).square().mean().sqrt()) or 1.0 for linear in linears}
        ends = []
        with self._in_float32():
            for step in (STEP, -STEP):
                for linear in linears:
                    moved = self._bank.original(linear) + step * sizes[linear] * signs[linear]
                    self._bank.module(linear).weight.data = moved
                ends.append(self._products(lambda linear: (signs[linear].float(),)))
        ahead, behind = ends
        # A linear's own step undone: its rms came in once, with v, while the gradient's v was taken as it is.
        return [float((ahead[linear] - behind[linear]).mean()) / (2 * STEP * sizes[linear]) for linear in linears]

    def _known(self, name: str, key: Any, cost: float, find: Callable[[], Any]) -> Any:
        """Plain data that was found earlier under a name and key, or is found and logged now; it costs the same."""
        rows = self._log.rows if self._log else []
        found = next((row["found"] for row in rows if name in row and row[name] == key), None)
        if found is None:
            found = find()
            if self._log:
                self._log.append({name: key, "found": found})
                self._log.sync()
        self.forwards += cost
        return found

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """The model at its unquantized weights, in float32 whatever it runs in: between two bfloat16 gradients of
        almost the same weights there is nothing but rounding. Afterwards it has the very tensors it had before."""
        self._bank.apply([None] * len(self._bank.layers))
        kept = [(parameter, parameter.data) for parameter in self._runner.model.parameters()]
        try:
            for parameter, data in kept:
                parameter.data = data.float()
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def _products(self, changes: Changes) -> dict[LinearSpec, FloatArray]:
        """Inner products of the gradient of each window's loss, in each playing linear's weight, with changes of that
        weight, where the model stands: (windows, changes) by linear, nats per token.

        No gradient of a weight is ever made: its inner product with a change D of the weight is that of the gradient
        of the linear's output with D x, token by token, which keeps the windows of a batch apart.
        """
        count, length = self._text.ids.shape
        batches = torch.split(torch.arange(count), max(1, BATCH_TOKENS // length))
        parts = [self._products_of(batch, changes) for batch in batches]
        return {linear: np.concatenate([part[linear] for part in parts]) for linear in parts[0]}

    def _remember(self) -> None:
        """Keep the unquantized model's last hidden states, where the loss is a divergence from it; costs a forward."""
        if self._value == "kl" and self._unquantized is None:
            self._bank.apply([None] * len(self._bank.layers))
            self._unquantized = torch.cat(self._runner.run_all(self._runner.embed(self._text.ids)))
            self.forwards += self._unit

    def _products_of(self, rows: torch.Tensor, changes: Changes) -> dict[LinearSpec, FloatArray]:
        ids = torch.from_numpy(np.asarray(self._text.ids))[rows]
        found: dict[LinearSpec, FloatArray] = {}
        model, handles = self._runner.model, []

        def watch(linear: LinearSpec) -> None:
            def forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                inputs = args[0].detach()

                def backward(grad: torch.Tensor) -> None:
                    moved = [(grad.float() * (inputs @ change.to(inputs.dtype).T).float()).flatten(1).sum(dim=1)
                             for change in changes(linear)]
                    found[linear] = found.get(linear, 0.0) + torch.stack(moved, dim=1).double().numpy()

                output.register_hook(backward)  # type: ignore[no-untyped-call]
            handles.append(self._bank.module(linear).register_forward_hook(forward))

        def start(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.requires_grad_(True)  # no parameter asks for a gradient, so the graph has to begin here

        try:
            handles.append(model.get_input_embeddings().register_forward_hook(start))
            for spec in self.space.layers:
                for linear in spec.linears:
                    watch(linear)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            if self._unquantized is None:
                loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            else:
                with torch.no_grad():
                    hidden = self._unquantized[rows].to(next(model.parameters()).dtype, copy=True)  # float32 for hawq
                    target = self._runner.logits(hidden)[:, :-1].log_softmax(dim=-1)
                loss = functional.kl_div(logits.log_softmax(dim=-1), target, reduction="sum", log_target=True)
            (loss / (ids.shape[1] - 1)).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
        return found

    @property
    def _text(self) -> Windows:
        if self._windows is None:
            raise ImpqError("an estimator asked for activations or gradients without saying so in its 'needs'")
        return self._windows
