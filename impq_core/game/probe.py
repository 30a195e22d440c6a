"""The probe of a real model: its weights, activations and gradients, block by block."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from impq_core.errors import ImpqError
from impq_core.game.ends import EndsInPlay
from impq_core.game.passes import Passes
from impq_core.game.products import (
    Changes,
    Mixed,
    Product,
    by_window,
    inner_products,
    keeping_first,
    sums_of_absolute,
    sums_of_squares,
)
from impq_core.game.readings import Readings
from impq_core.interfaces import CarryOut
from impq_core.ledger import Ledger
from impq_core.model.backward import BATCH_TOKENS, Backward, Watch, by_room, inside, squared_gradients, watching
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel, Hidden
from impq_core.model.cost import ForwardCost, flop_counter
from impq_core.model.device import on_host
from impq_core.model.text import Windows
from impq_core.space import Choice, FloatArray, LinearSpec, SearchSpace

STEP = 3e-3
"""Step of a difference of gradients, relative to the root mean square of a linear's own weights. On the tests' tiny
models its relative error is 0.001; it is up to 0.01 for steps from 0.0001 to 0.01, and at least 0.08 for any step in
bfloat16."""

DRAW = "draw"
"""Name of the reading of ``hessian_traces`` in the log; its key is the seed of a random draw."""

class ModelProbe:
    """Implements ``impq_core.interfaces.Probe``.

    Args:
        space: the layers and choices of the game.
        bank: the variants and the unquantized weights.
        runner: the model.
        windows: calibration windows; None for an inspector that reads no text.
        value: the loss: ``nll``, or ``kl`` to the unquantized model. The slopes of ``kl`` are zero at the unquantized
            weights, so they hold no first-order effect of errors that happen to suit the text.
        game_windows: the number of windows of a forward, the unit of cost; 0 is the number of ``windows``.
        log: slopes and traces are written to it before they are returned, and those of an earlier process are read
            from it; they cost the same either way.
        carry_out: workers that read slopes and traces for the log, if there is one. Their tasks of kind ``gradients``
            are answered by ``read_windows`` of the same probe of the worker.
        passes: counts the windows that slopes and traces have been read of.
    """

    def __init__(self, space: SearchSpace, bank: Bank, runner: BlockwiseModel, windows: Windows | None,
                 value: str = "nll", game_windows: int = 0, log: Ledger | None = None,
                 carry_out: CarryOut | None = None, passes: Passes | None = None) -> None:
        self._passes = passes or Passes()
        self.space, self._readings = space, Readings(log, carry_out, self._passes.reach)
        self._bank, self._runner, self._windows, self._value = bank, runner, windows, value
        self._unquantized: torch.Tensor | None = None
        self._batch_tokens = BATCH_TOKENS
        self._game_windows = game_windows or (len(windows.ids) if windows else 0)
        self._spent, self._counted = 0, dict[Hashable, int]()
        self._linears = [linear for layer in space.layers for linear in layer.linears]
        self._modules = {linear: bank.module(linear) for linear in self._linears}
        self._ends = EndsInPlay.of(runner.model, space, bank.embedding, bank.head)

    @property
    def forwards(self) -> float:
        """Cost so far in forwards of the game's windows, as ``ForwardCost`` defines them."""
        return self._spent / (self._game_windows * self._cost.total) if self._spent else 0.0

    @property
    def _cost(self) -> ForwardCost:
        return self._runner.cost(self._text.ids)

    def _flops(self, product: Product, number: int) -> int:
        """FLOPs of a reading of one window, counted on the first: a forward, and for each block another one, a
        backward, and the products. Inner products are without the changes (under 1 % with windows of 256 tokens), so
        that they do not depend on the number of choices."""
        count = number if product is sums_of_squares else 0
        return self._flops_of((product, count), lambda first: self._products_of(
            first, lambda linear: [self._bank.original(linear)] * count, count, product))

    def _flops_of(self, name: Hashable, work: Callable[[slice], object]) -> int:
        """FLOPs of what a reading with a name does with one window, counted on the first, once."""
        if name not in self._counted:
            _ = self._cost  # the first passes of a model have checks, which are no part of a pass
            self._runner.learn_backward(self._text.ids)
            self._bank.apply([None] * len(self._bank.layers))  # other weights may route tokens to other experts
            with flop_counter() as counter:
                work(slice(0, 1))
            self._counted[name] = int(counter.get_total_flops())
        return self._counted[name]

    @property
    def window_tokens(self) -> int:
        """Scored tokens of a window, on average."""
        return round(self._text.scored_tokens / len(self._text.ids))

    def weight(self, linear: LinearSpec) -> torch.Tensor:
        """The unquantized weight (rows, columns), float32."""
        return self._bank.original(linear)

    def variant(self, linear: LinearSpec, choice: Choice) -> torch.Tensor:
        """The weight (rows, columns) at a choice, float32."""
        return self._bank.variant(linear, choice)

    def block_states(self) -> Iterator[tuple[int, list[torch.Tensor], list[torch.Tensor]]]:
        """The index of each block of the unquantized model, its input and its output, as batches (windows, length,
        width); costs the blocks' share of a forward of the windows, more if the model has no partial forwards."""
        self._bank.apply([None] * len(self._bank.layers))
        hidden = self._runner.embed(self._text.ids)
        for index in range(len(self._runner)):
            output = self._runner.run(index, hidden)
            self._charge_block(index)
            yield index, [batch.states for batch in hidden], [batch.states for batch in output]
            hidden = output

    def _charge_block(self, index: int) -> None:
        first = index if self._runner.partial else 0
        self._spent += len(self._text.ids) * sum(self._cost.blocks[first:index + 1])

    @contextmanager
    def charging(self) -> Iterator[None]:
        """The context in which matrix products are charged, see ``Probe``."""
        with flop_counter() as counter:
            yield
        self._spent += int(counter.get_total_flops())

    def first_outputs(self, weights: Callable[[LinearSpec], torch.Tensor] | None = None) -> Iterator[
            tuple[int, dict[LinearSpec, list[torch.Tensor]]]]:
        """The outputs of the linears that run first in each block, see ``Probe``; costs the blocks' share of a forward
        of the windows, more if the model has no partial forwards."""
        runner, linears = self._runner, [linear for layer in self.space.everyone for linear in layer.linears]
        inner = [{linear: module for linear in linears if (module := self._bank.module(linear)) in modules}
                 for modules in (set(block.modules()) for block in runner.blocks)]
        self._bank.apply([None] * len(self._bank.layers))
        try:
            for linear, module in (item for block in inner for item in block.items() if weights):
                assert weights is not None
                runner.placement.replace(module, partial(self._given, weights, linear))
            hidden = runner.embed(self._text.ids)
            for index, here in enumerate(inner):
                found: dict[LinearSpec, list[torch.Tensor]] = {}
                output: Hidden = []
                with runner.placement.loaded(index):
                    for batch in hidden:
                        with keeping_first(here, found):
                            output.append(runner.run_batch(index, batch))
                self._charge_block(index)
                yield index, found
                hidden = output
        finally:
            self._bank.apply([None] * len(self._bank.layers))

    def _given(self, weights: Callable[[LinearSpec], torch.Tensor], linear: LinearSpec) -> torch.Tensor:
        """An estimator's weight, which may have been drawn on the host, on the device."""
        return weights(linear).to(self._runner.device)

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        """First-order changes (windows, n, m) of each window's loss, nats per token; costs about four forwards of the
        windows (forward, each block once more, backward, gradients of the weights), however many choices there are."""
        return self._read("at", at)

    def token_squares(self, at: FloatArray | None = None) -> FloatArray:
        """Mean squares (windows, n, m), see ``Probe``; costs about three forwards of the windows, and for each choice
        one of their linears."""
        squares = self._read("squares at", at)
        return squares * (self._text.ids.shape[1] - 1)  # the gradients are of the mean loss of a window

    def absolute_slopes(self, at: FloatArray | None = None) -> FloatArray:
        """Sums of absolute terms (windows, n), see ``Probe``; costs about four forwards of the windows."""
        return self._read("absolute at", at)[:, :, 0]

    def _to_choices(self, linear: LinearSpec) -> Iterator[torch.Tensor]:
        """Changes of the current weight of a linear to each choice."""
        weight = self._bank.module(linear).weight.float()
        return (self._bank.variant(linear, choice) - weight for choice in self.space.choices)

    def _back(self, linear: LinearSpec) -> Iterator[torch.Tensor]:
        """The change of the current weight of a linear to the unquantized one."""
        yield self._bank.original(linear) - self._bank.module(linear).weight.float()

    def _reading(self, name: str) -> tuple[Product, Changes, int]:
        """What a reading of a name multiplies gradients with, and the number of changes of a linear."""
        many = len(self.space.choices)
        return {"at": (inner_products, self._to_choices, many), "squares at": (sums_of_squares, self._to_choices, many),
                "absolute at": (sums_of_absolute, self._back, 1)}[name]

    def _read(self, name: str, at: FloatArray | None) -> FloatArray:
        """The reading (windows, n, number) of a name at shares ``at``, summed over the linears of a layer."""
        product, _, number = self._reading(name)
        if product is sums_of_absolute:
            self._ends.require_blocks()
        if product is not sums_of_squares:
            self._remember()
        shares = None if at is None else np.asarray(at, dtype=np.float64).tolist()
        return np.array(self._logged(name, shares, self._flops(product, number)), dtype=np.float64)

    def read_windows(self, name: str, key: Any, first: int, stop: int) -> list[Any]:
        """A reading of some of the windows as plain data, one entry for each window: what ``slopes`` and the other
        methods read is put together from it.

        Args:
            name: of the reading.
            key: the shares at which gradients are taken, or the draw of ``hessian_traces``.
            first, stop: the windows.
        """
        some = slice(first, stop)
        if name == DRAW:
            self._remember()
            found: list[Any] = self._differences(np.random.default_rng(key), some).tolist()
            return found
        product, changes, number = self._reading(name)
        if product is not sums_of_squares:
            self._remember()
        self._blend(None if key is None else np.array(key))
        products = self._products(changes, number, product, some)  # (windows, number) by linear
        found = np.stack([np.sum([products[linear] for linear in layer.linears], axis=0)
                          for layer in self.space.layers], axis=1).tolist()
        return found

    def _blend(self, at: FloatArray | None) -> None:
        """Let each layer's weights be blended by shares (m,) or (n, m); None is the unquantized model."""
        self._bank.apply([None] * len(self._bank.layers))
        if at is not None:
            for layer, shares in enumerate(np.broadcast_to(at, self.space.nbytes.shape)):
                self._bank.blend(layer, {choice: float(share) for choice, share
                                         in zip(self.space.choices, shares, strict=True) if share})
            for layer, pin in enumerate(self.space.pinned, start=len(self.space)):
                self._bank.switch(layer, pin.choice)

    def hessian_traces(self, rng: np.random.Generator) -> dict[LinearSpec, float]:
        """One draw of the trace of the loss's Hessian in each linear's weight; costs about eight forwards of the
        windows.

        The draw is ``v' H v`` for one random sign vector v over all linears at once (Hutchinson; terms between linears
        have mean zero). ``H v`` is the difference of gradients on either side of the weights, because attention kernels
        may have no second derivative. The seed of v comes from ``rng``.
        """
        self._remember()
        draw = int(rng.integers(2**63))
        flops = 2 * self._flops(inner_products, 1)
        differences = np.array(self._logged(DRAW, draw, flops), dtype=np.float64)
        # The step of a linear's weight is STEP times its root mean square, which divides the difference once.
        return {linear: float(difference.mean()) / (2 * STEP * self._size(linear))
                for linear, difference in zip(self._linears, differences.T, strict=True)}

    def _size(self, linear: LinearSpec) -> float:
        return float(self._bank.original(linear).square().mean().sqrt()) or 1.0

    def _differences(self, rng: np.random.Generator, some: slice) -> FloatArray:
        """Differences (windows, linears) of the inner products of gradients on either side of the weights with random
        signs."""
        linears, device = self._linears, self._runner.device
        # Drawn on the host: the draws are the same on every device.
        signs = {linear: torch.from_numpy(2 * rng.integers(0, 2, (linear.rows, linear.columns), dtype=np.int8) - 1)
                 for linear in linears}
        sizes = {linear: self._size(linear) for linear in linears}

        def moved(linear: LinearSpec, step: float) -> torch.Tensor:
            return self._bank.original(linear) + step * sizes[linear] * signs[linear].to(device)

        products = []
        self._bank.apply([None] * len(self._bank.layers))
        try:
            # The difference of two bfloat16 gradients at almost equal weights would be rounding error.
            with self._runner.placement.in_float32():
                for step in (STEP, -STEP):
                    for linear in linears:
                        self._runner.placement.replace(self._bank.module(linear), partial(moved, linear, step))
                    products.append(self._products(
                        lambda linear: (signs[linear].to(device).float(),), 1, inner_products, some))
        finally:
            self._bank.apply([None] * len(self._bank.layers))  # the signs take a byte a weight
        above, below = products
        return np.concatenate([above[linear] - below[linear] for linear in linears], axis=1)

    def output_curvature(self, groups: int = 1) -> Iterator[tuple[LinearSpec, torch.Tensor]]:
        """The curvature of the mean loss in each linear of a block, see ``Probe``; costs about three forwards of the
        windows, and a product of each linear's inputs with themselves for each group."""
        self._ends.require_blocks()
        some = list(by_room(self._runner, self._text.ids))
        self._spent += len(self._text.ids) * self._flops_of(
            groups, lambda first: [0 for _ in self._curvature_of(first, groups)])
        for part in some:
            yield from self._curvature_of(part, groups)

    def _curvature_of(self, some: slice, groups: int) -> Iterator[tuple[LinearSpec, torch.Tensor]]:
        scored = self._text.ids.shape[1] - 1
        total = len(self._text.ids) * scored
        backward = Backward(self._runner, self._text.ids[some], weights=self._weights(some, squared=True))
        for stage in backward.stages(backward.head()):
            grams: dict[LinearSpec, torch.Tensor] = {}

            def watch(linear: LinearSpec, inputs: torch.Tensor,
                      grams: dict[LinearSpec, torch.Tensor] = grams) -> Callable[[torch.Tensor], None]:
                def seen(gradient: torch.Tensor) -> None:
                    rows = inputs.reshape(-1, linear.columns).float()
                    weights = squared_gradients(gradient, scored, groups).T / total  # (groups, tokens)
                    gram = torch.stack([(rows * weight[:, None]).T @ rows for weight in weights])
                    grams[linear] = grams[linear] + gram if linear in grams else gram
                return seen

            with watching(inside(self._runner, stage, self._modules), watch):
                for number in range(len(stage.batches)):
                    stage.run(number)
            yield from grams.items()

    def _logged(self, name: str, key: Any, flops: int) -> list[Any]:
        """``read_windows`` of all windows, from the log if it is there; ``flops`` for each window are charged in any
        case."""
        self._spent += flops * len(self._text.ids)
        with self._passes.over(len(self._text.ids)):
            return self._readings.read(name, key, self._text.ids.shape, partial(self.read_windows, name, key))

    def _products(self, changes: Changes, number: int, product: Product,
                  some: slice) -> dict[LinearSpec, FloatArray]:
        """Products of the gradient of the loss of each of some windows, in each linear's weight, with ``number``
        changes of that weight, at the model's current weights. They are 0 if a window does not reach the linear.

        Returns:
            (windows, number) by linear, nats per token.
        """
        first, ids = some.start, self._text.ids[some]
        try:
            parts = [self._products_of(slice(first + part.start, min(first + part.stop, some.stop)), changes, number,
                                       product) for part in by_room(self._runner, ids, self._batch_tokens)]
        except Mixed:  # the inputs of experts: each batch must be a single window
            self._batch_tokens = 1
            return self._products(changes, number, product, some)
        return {linear: np.concatenate([part[linear] for part in parts]) for linear in self._linears}

    def _weights(self, some: slice, squared: bool) -> FloatArray | None:
        """Weights (windows, length - 1) of the predicted tokens of some windows; None if all count alike. Squares of
        gradients take the roots: their mean over tokens is weighted once, as that of the losses."""
        weights = self._text.weights
        if weights is None:
            return None
        return np.sqrt(weights[some]) if squared else weights[some]

    def _remember(self) -> None:
        """Keep the unquantized model's last hidden states if the loss is a divergence from it; costs the blocks' share
        of a forward of the windows."""
        if self._value == "kl" and self._unquantized is None:
            self._bank.apply([None] * len(self._bank.layers))
            hidden = self._runner.run_all(self._runner.embed(self._text.ids))
            self._unquantized = torch.cat([batch.states for batch in hidden], dim=self._runner.forward.axis)
            self._spent += len(self._text.ids) * self._cost.behind(0)

    def _products_of(self, some: slice, changes: Changes, number: int,
                     product: Product) -> dict[LinearSpec, FloatArray]:
        """As ``_products``, for some of the windows. Changes of a block are made once for all of them. Embedding and
        head have no absolute terms."""
        runner, ids = self._runner, self._text.ids[some]
        products: dict[LinearSpec, FloatArray] = {linear: np.zeros((len(ids), number)) for linear in self._linears}
        squares = product is sums_of_squares
        backward = Backward(runner, ids, self._batch_tokens, self._weights(some, squares))
        reference = None if self._unquantized is None or squares else self._unquantized.narrow(
            runner.forward.axis, some.start, len(ids))
        with self._ends.watching_head(changes, products, ids.shape[1] - 1, squares) as rows:
            gradients = backward.head(reference, rows)
        for stage in backward.stages(gradients):
            self._passes.reach(some.start + len(ids) * (1 - (stage.last + 1) / len(runner)))
            here = inside(runner, stage, self._modules)
            made = {linear: [change.to(self._bank.module(linear).weight.dtype) for change in changes(linear)]
                    for linear in here if runner.partial}  # else they would be of all blocks at once
            ways: Changes = made.__getitem__ if runner.partial else changes
            moved = [] if stage.first else self._ends.moved_embedding(
                changes, torch.cat([batch.ids for batch in stage.batches]))
            row = 0
            for place, batch in enumerate(stage.batches):
                with watching(here, self._multiply(product, ways, batch.ids, products, row)), (
                        self._ends.watching_embedding(moved, products, slice(row, row + len(batch.ids)), squares)):
                    stage.run(place)
                row += len(batch.ids)
        return products

    def _multiply(self, product: Product, changes: Changes, ids: torch.Tensor,
                  products: Mapping[LinearSpec, FloatArray], row: int) -> Watch[LinearSpec]:
        """What adds the products of the gradients of a batch with ``changes`` to ``products``, from that row on."""
        def watch(linear: LinearSpec, mixed: torch.Tensor) -> Callable[[torch.Tensor], None]:
            inputs = by_window(mixed, ids)

            def backward(gradient: torch.Tensor) -> None:
                outputs, made = gradient.reshape(*inputs.shape[:2], linear.rows), list(changes(linear))
                for window in range(len(ids)):
                    found = product(inputs[window], outputs[window], made)
                    if made:
                        products[linear][row + window] += on_host(torch.stack(found))
            return backward
        return watch

    @property
    def _text(self) -> Windows:
        if self._windows is None:
            raise ImpqError("bug of the estimator: it reads activations or gradients, but its attribute 'needs' does "
                            "not name them")
        return self._windows
