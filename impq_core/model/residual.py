"""Which modules read and write a model's hidden states, and which linears read values, by watching one forward.

One token goes through the model. The outputs of all norms as wide as the hidden states are cut from the graph, so that
what is left of it are the additions to the hidden states: the gradient of ``u @ final hidden states`` in anything that
is added to them (rows of embeddings, outputs of linears, the hidden states themselves) is a multiple of ``u``, for any
vector u, and in nothing else. A module reads the hidden states if its input is a multiple of such a norm's output.

With one token an attention multiplies each value by one number (1, or less if it has sinks), so a head of the input of
the linear behind it is a multiple of some rows of the output of the linear in front of it. That says which rows they
are, however linears are fused and heads are shared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from impq_core.errors import ImpqError, one_line
from impq_core.model.layers import blocks_of

_CLOSE = 1e-4
"""The part of a vector, relative to its length, that may not be a multiple of another: rounding of float32."""


@dataclass(frozen=True)
class Residual:
    """The modules around the hidden states, by their names.

    Args:
        width: components of the hidden states.
        tables: embeddings whose rows are added to them.
        writers: linears whose outputs are added to them.
        norms: norms that read them, each with the linears (and routers) that read its output.
        after: norms whose outputs are added to them, such as those behind the attention of Gemma-2.
        unseen: a module that is as wide as the hidden states and did not work in a forward of text; empty if there is
            none.
    """

    width: int
    tables: tuple[str, ...]
    writers: tuple[str, ...]
    norms: Mapping[str, tuple[str, ...]]
    after: tuple[str, ...]
    unseen: str


@dataclass(frozen=True)
class Heads:
    """Linears on both sides of an attention.

    Args:
        values: the linear that writes values.
        outputs: the linear that reads them.
        rows: for each head of ``outputs``, the first row of ``values`` that it reads; a head reads consecutive rows.
        size: components of a head.
    """

    values: str
    outputs: str
    rows: tuple[int, ...]
    size: int


@dataclass(eq=False)
class _Seen:
    """What a module was given and has returned, in each of its calls, as (rows, width), and gradients of both."""

    order: int
    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    into: list[torch.Tensor | None] = field(default_factory=list)
    out: list[torch.Tensor | None] = field(default_factory=list)


def observe(model: PreTrainedModel) -> tuple[Residual, tuple[Heads, ...]]:
    """Watch a forward of one token, and a backward pass through the additions.

    Args:
        model: with float32 weights on the CPU, after ``to_linears``; no parameter requires a gradient.

    Raises:
        ImpqError: the model has no embedding or no linear head, or no norm in front of the head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    kind = type(model).__name__
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ImpqError(f"{kind} has no input embedding or no linear head: it cannot be rotated")
    watch = _Watch(model, embedding.embedding_dim)
    tokens = torch.tensor([[embedding.num_embeddings // 2]])
    try:
        with torch.enable_grad():
            model(input_ids=tokens)
            u = watch.backward(head, kind)
    except ImpqError:
        raise
    except Exception as error:  # of the model's code, or hidden states that are written to in place
        raise ImpqError(f"the hidden states of {kind} cannot be watched ({one_line(error, 100)}): it cannot be "
                        "rotated") from error
    finally:
        watch.remove()
    return watch.residual(u), watch.heads()


class _Watch:
    """Hooks on the modules that have weights as wide as the hidden states, and on all linears."""

    def __init__(self, model: PreTrainedModel, width: int) -> None:
        self.model, self.width = model, width
        self.names = {module: name for name, module in model.named_modules()}
        self.seen: dict[str, _Seen] = {}
        self.tables, self.matrices, self.norms = list[str](), list[str](), list[str]()
        self._hooks = []
        for module, name in self.names.items():
            own = list(module._parameters.values())
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Embedding):
                if module.embedding_dim == width:
                    self.tables.append(name)
                    self._hooks.append(module.register_forward_hook(self._table))
            elif weight is not None and weight.dim() == 2:
                self.matrices.append(name)
                self._hooks.append(module.register_forward_hook(self._matrix))
            elif not module._modules and all(value is None or tuple(value.shape) == (width,) for value in own):
                self.norms.append(name)
                self._hooks.append(module.register_forward_hook(self._norm))

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _of(self, module: nn.Module) -> _Seen:
        return self.seen.setdefault(self.names[module], _Seen(len(self.seen)))

    def _table(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        seen, leaf = self._of(module), output.detach().clone().requires_grad_()
        leaf.register_hook(seen.out.append)  # type: ignore[no-untyped-call]
        return leaf

    def _matrix(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen = self._of(module)
        if args and isinstance(args[0], torch.Tensor):
            seen.inputs.append(args[0].detach().flatten(0, -2).clone())
        if isinstance(output, torch.Tensor):
            seen.outputs.append(output.detach().flatten(0, -2).clone())
            if output.requires_grad:
                output.register_hook(seen.out.append)  # type: ignore[no-untyped-call]

    def _norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        if (not args or not isinstance(args[0], torch.Tensor) or not isinstance(output, torch.Tensor)
                or output.shape != args[0].shape or output.shape[-1] != self.width or torch.equal(output, args[0])):
            return None  # no norm, or one that is switched off, such as dropout
        seen, leaf = self._of(module), output.detach().clone().requires_grad_()
        seen.inputs.append(args[0])
        seen.outputs.append(leaf.detach().flatten(0, -2))
        if args[0].requires_grad:
            args[0].register_hook(seen.into.append)  # type: ignore[no-untyped-call]
        leaf.register_hook(seen.out.append)  # type: ignore[no-untyped-call]
        return leaf

    def backward(self, head: nn.Linear, kind: str) -> torch.Tensor:
        """The gradients of ``u @ h`` for the hidden states h that the last norm, that in front of the head, reads.

        Returns:
            u (width,).
        """
        read = self.seen[self.names[head]].inputs if self.names[head] in self.seen else []
        last = [self.seen[name] for name in self.norms if read and name in self.seen
                and _multiple(read[0], self.seen[name].outputs[-1][0])]
        if not last:
            raise ImpqError(f"{kind} has no norm in front of its head that can be watched: it cannot be rotated")
        hidden = max(last, key=lambda seen: seen.order).inputs[-1]
        u = torch.randn(self.width, generator=torch.Generator().manual_seed(0))
        if hidden.requires_grad:
            hidden.backward(u.expand_as(hidden))  # type: ignore[no-untyped-call]
        return u

    def residual(self, u: torch.Tensor) -> Residual:
        """The modules around the hidden states."""
        def adds(name: str) -> bool:
            return name in self.seen and _all_multiples(self.seen[name].out, u)

        reading = [name for name in self.norms if name in self.seen and _all_multiples(self.seen[name].into, u)]
        readers: dict[str, list[str]] = {name: [] for name in reading}
        writers = list[str]()
        for name in self.matrices:
            weight = self.model.get_submodule(name)._parameters["weight"]
            assert weight is not None
            if weight.shape[1] == self.width and (found := self._norm_in_front(name, reading)):
                readers[found].append(name)
            if weight.shape[0] == self.width and adds(name):
                writers.append(name)
        tables = tuple(name for name in self.tables if adds(name))
        after = tuple(name for name in self.norms if adds(name))
        for names in (*readers.values(), writers):  # experts that no token has reached are as those that one has
            names += [other for other in self._siblings(names) if other not in self.seen]
        worked = {*self.seen, *writers, *(name for names in readers.values() for name in names)}
        unseen = next((name for name in (*self.tables, *self.matrices) if name not in worked and any(
            self.width in value.shape for value in self.model.get_submodule(name).parameters(recurse=False))), "")
        return Residual(self.width, tables, tuple(writers),
                        {name: tuple(found) for name, found in readers.items()}, after, unseen)

    def _norm_in_front(self, name: str, norms: list[str]) -> str:
        """The norm whose output a module reads; empty if there is none."""
        if name not in self.seen or not self.seen[name].inputs:
            return ""
        seen = self.seen[name]
        found = [norm for norm in norms if self.seen[norm].order < seen.order
                 and all(_multiple(value, self.seen[norm].outputs[-1][0]) for value in seen.inputs)]
        return max(found, key=lambda norm: self.seen[norm].order, default="")

    def _siblings(self, names: list[str]) -> list[str]:
        """Matrices that have the names of others but for the numbers of modules inside a block."""
        blocks = [name for name, _ in blocks_of(self.model)]
        known = {_unnumbered(name, blocks) for name in names}
        return [name for name in self.matrices if _unnumbered(name, blocks) in known]

    def heads(self) -> tuple[Heads, ...]:
        """Pairs of linears around an attention."""
        pairs = []
        for block, _ in blocks_of(self.model):
            inside = sorted((name for name in self.matrices if name in self.seen and name.startswith(f"{block}.")
                             and len(self.seen[name].outputs) == 1), key=lambda name: self.seen[name].order)
            for number, reader in enumerate(inside):
                pairs += [heads for writer in inside[:number] if (heads := self._pair(writer, reader))]
        return tuple(pairs)

    def _pair(self, writer: str, reader: str) -> Heads | None:
        """The heads in which one linear reads what another writes; None if it does not."""
        written, read, size = self.seen[writer].outputs[0], self.seen[reader].inputs[0], self._head_size(reader)
        if len(written) != 1 or len(read) != 1 or not size or read.shape[1] % size or written.shape[1] < size:
            return None
        rows = nn.functional.normalize(written[0].double().unfold(0, size, 1), dim=1)
        heads = nn.functional.normalize(read[0].double().reshape(-1, size), dim=1)
        likeness = (heads @ rows.T).abs()
        first = likeness.argmax(dim=1)
        if float(likeness.amax(dim=1).min()) < 1 - _CLOSE**2:
            return None
        return Heads(writer, reader, tuple(first.tolist()), size)

    def _head_size(self, reader: str) -> int:
        parent = self.model.get_submodule(reader.rpartition(".")[0])
        sizes = (getattr(parent, name, None) for name in ("v_head_dim", "head_dim"))
        return next((size for size in sizes if isinstance(size, int)), 0)


def _unnumbered(name: str, blocks: list[str]) -> str:
    block = next((block for block in blocks if name.startswith(f"{block}.")), "")
    return block + re.sub(r"\.\d+(?=\.)", ".*", name[len(block):])


def _multiple(rows: torch.Tensor, vector: torch.Tensor) -> bool:
    """Whether all rows that are not zero are multiples of a vector, and there is one."""
    if rows.shape[-1] != len(vector):
        return False
    rows, vector = rows.flatten(0, -2).double(), vector.double()
    lengths = rows.norm(dim=1)
    rows, lengths = rows[lengths > 0], lengths[lengths > 0]
    if not len(rows) or not vector.norm():
        return False
    vector = vector / vector.norm()
    rest = rows - (rows @ vector)[:, None] * vector
    return bool((rest.norm(dim=1) <= _CLOSE * lengths).all())


def _all_multiples(gradients: list[torch.Tensor | None], vector: torch.Tensor) -> bool:
    """Whether all gradients are multiples of a vector; None is the gradient of what nothing depends on."""
    found = [gradient for gradient in gradients if gradient is not None]
    return bool(found) and all(_multiple(gradient, vector) for gradient in found)
