"""Gradients of a loss in the weights of embedding and head, in products with changes of these weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from impq_core.errors import ImpqError
from impq_core.game.products import Changes, inner_products, shares_of_tokens
from impq_core.model.backward import Rows
from impq_core.model.device import on_host
from impq_core.model.ends import ends_of
from impq_core.space import FloatArray, LinearSpec, SearchSpace

HEAD_TOKENS = 2**14
"""Rows of the gradient of a head's weight that exist at once."""


@dataclass(frozen=True, eq=False)
class EndsInPlay:
    """Embedding and head of a model, as far as they are layers of a game.

    Args:
        model: the model.
        embedding: the embedding's linear; None if it does not play.
        head: the head's, which is the embedding's if they are tied; None if it does not play.
    """

    model: PreTrainedModel
    embedding: LinearSpec | None
    head: LinearSpec | None

    @classmethod
    def of(cls, model: PreTrainedModel, space: SearchSpace, embedding: int | None, head: int | None) -> EndsInPlay:
        """Those among the layers of a space, by their numbers; None and numbers behind the space do not play."""
        return cls(model, *(None if layer is None or layer >= len(space) else space.layers[layer].linears[0]
                            for layer in (embedding, head)))

    def require_blocks(self) -> None:
        """Raises ImpqError if embedding or head play."""
        if self.embedding or self.head:
            raise ImpqError("this estimator knows no cost of embedding and head: leave out --quantize-embeddings, or "
                            "take another --estimator")

    def moved_embedding(self, changes: Changes, ids: torch.Tensor) -> list[torch.Tensor]:
        """Changes of what the embedding returns for ids (windows, length); empty if it does not play."""
        if not self.embedding:
            return []
        return embedded_changes(ends_of(self.model).embedding, changes(self.embedding), ids)

    def watching_embedding(self, moved: Sequence[torch.Tensor], products: Mapping[LinearSpec, FloatArray],
                           rows: slice, squares: bool) -> AbstractContextManager[None]:
        """The context in which a backward pass over some of the windows adds to the embedding's ``products``."""
        if not self.embedding or not moved:
            return nullcontext()
        return _watching_embedding(ends_of(self.model).embedding, [change[rows] for change in moved],
                                   products[self.embedding][rows], squares)

    def watching_head(self, changes: Changes, products: Mapping[LinearSpec, FloatArray], scored: int,
                      squares: bool) -> AbstractContextManager[Rows]:
        """The context in which a backward pass through the head adds to its ``products``; see ``_watching_head``."""
        if not self.head:
            return nullcontext(Rows())
        return _watching_head(ends_of(self.model).head, changes(self.head), products[self.head], scored, squares)


@torch.no_grad()
def embedded_changes(embedding: nn.Embedding, changes: Iterable[torch.Tensor],
                     ids: torch.Tensor) -> list[torch.Tensor]:
    """What an embedding returns for ids (windows, length) if its weight is a change (tokens, width): float32 (windows,
    length, width) for each change. It is linear in its weight, so this is the change of what it returns."""
    return [functional_call(embedding, {"weight": change.to(embedding.weight.dtype)}, (ids,)).float()
            for change in changes]


@contextmanager
def _watching_embedding(embedding: nn.Embedding, moved: Sequence[torch.Tensor], products: FloatArray,
                        squares: bool) -> Iterator[None]:
    """The context in which a backward pass through the first block adds inner products to ``products`` (windows,
    changes): those of the gradient in the embedding's output with ``moved``, the changes of that output (windows,
    length, width); with ``squares``, the sums over tokens of their squared shares."""
    def backward(grad: torch.Tensor) -> None:
        if moved:
            shares = torch.stack([(grad.float() * change).sum(dim=2) for change in moved], dim=2)
            products[:] += on_host((shares.square() if squares else shares).sum(dim=1))

    def forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().clone().requires_grad_()  # no parameter requires a gradient: the graph starts here
        leaf.register_hook(backward)  # type: ignore[no-untyped-call]
        return leaf

    handle = embedding.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watching_head(head: nn.Linear, changes: Iterable[torch.Tensor], products: FloatArray,
                   scored: int, squares: bool) -> Iterator[Rows]:
    """The context in which a backward pass through the head adds inner products to ``products`` (windows, changes):
    those of the gradient of its weight with changes of it (tokens, width).

    Args:
        head: the module.
        changes: made once, and kept in the type of the weight.
        products: added to.
        scored: rows of a window.
        squares: add the sums over tokens of their squared shares instead.

    Yields:
        To be told the rows of each pass before it begins.
    """
    rows, made = Rows(), [change.to(head.weight.dtype) for change in changes]

    def forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not output.requires_grad:
            return  # the logits of the unquantized model
        inputs, first, end = args[0].detach().flatten(0, -2), rows.first, rows.first + rows.count

        def backward(grad: torch.Tensor) -> None:
            outputs = grad.flatten(0, -2)
            for window in range(first // scored, (end - 1) // scored + 1):
                part = slice(max(first, window * scored) - first, min(end, (window + 1) * scored) - first)
                chunks = [slice(start, start + HEAD_TOKENS) for start in range(0, head.out_features, HEAD_TOKENS)]
                if made and squares:
                    products[window] += on_host(torch.stack([
                        sum((shares_of_tokens(inputs[part], outputs[part, chunk], change[chunk]) for chunk in chunks),
                            start=torch.zeros((), device=grad.device)).square().sum() for change in made]))
                elif made:
                    for chunk in chunks:
                        products[window] += on_host(torch.stack(inner_products(
                            inputs[part], outputs[part, chunk], [change[chunk] for change in made])))

        output.register_hook(backward)  # type: ignore[no-untyped-call]

    handle = head.register_forward_hook(forward)
    try:
        yield rows
    finally:
        handle.remove()
