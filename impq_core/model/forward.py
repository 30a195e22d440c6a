"""A model's own forward, with its blocks watched, answering from memory, or ending it.

Whatever a model does before, between and after its blocks (scales, norms, caps, multipliers, inputs for each layer) is
the model's own code at work. A block answers from memory if its forward is replaced by one that returns an output kept
from an earlier forward.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from impq_core.errors import ImpqError, one_line
from impq_core.model.arguments import hidden_in, leaves, states_in, unlike, with_hidden
from impq_core.model.device import repeatable
from impq_core.model.ends import ends_of

UNSUPPORTED = "impq cannot run this architecture block by block yet"

CHECKED = 64
"""Tokens of a window that the check of a partial forward reads."""

Replacement = Callable[..., Any]
"""The forward of a block for as long as it is replaced."""


class _Stop(Exception):
    """Ends a forward when all that was asked for has been computed."""


@dataclass(eq=False)
class _Watched:
    """One plain forward: the leaves of each block's arguments, each block's states, and the logits."""

    arguments: list[dict[str, Any]] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class OwnForward:
    """Whole and partial forwards of a model.

    Args:
        model: ready for inference.
        blocks: its blocks, in order.
        loaded: the context in which a block with an index has its weights.

    Attributes:
        handed: name of an argument through which blocks hand a state to later blocks (shared keys and values, indices
            of tokens), or ``no argument`` if the state is elsewhere. A forward of such a model cannot begin at a block:
            blocks that answer from memory write no state. Empty if there is none; set by ``learn``.
        strict: whether backward passes refuse operators without a repeatable kernel; set by ``learn_backward``.
        axis: the dimension of hidden states that counts windows; positions are the next. 0 for most models; a few keep
            several streams (streams, windows, length, width).
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module],
                 loaded: Callable[[int], AbstractContextManager[None]] = lambda index: nullcontext()) -> None:
        self.model, self.blocks, self.handed, self.axis, self.strict = model, tuple(blocks), "", 0, True
        self._loaded = loaded
        self._lengths: list[int] = []
        accepted = inspect.signature(model.forward).parameters.values()
        self._accepted = {parameter.name for parameter in accepted}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted):
            self._accepted.add("use_cache")

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (windows, length, vocabulary) of token ids (windows, length) by the plain forward."""
        return self._run(ids, [self._block(index) for index in range(len(self.blocks))])

    def learn(self, ids: torch.Tensor) -> None:
        """Find out what the blocks return, whether they hand a state to each other, and whether partial forwards agree
        with the plain one on a window and on the same window backwards. Costs about three forwards of ``CHECKED``
        tokens (five if blocks hand on a state).

        Args:
            ids: one window (1, length).

        Raises:
            ImpqError: the blocks are not called once each, in order, or a partial forward gives other logits.
        """
        texts = [ids[:, :CHECKED], ids[:, :CHECKED].flip(1)]
        plains = [self._watch(text) for text in texts]  # all in front of the checks: a state in a module is then stale
        self.handed = next(filter(None, map(self._handed, texts, plains)), "")
        agreed = all(map(self._agrees, texts, plains))
        if not agreed and not self.handed:
            self.handed = "no argument"
            agreed = all(map(self._agrees, texts, plains))
        if not agreed:
            raise ImpqError(f"the logits of {type(self.model).__name__} depend on more than the output of its last "
                            f"block at the same position: {UNSUPPORTED}")

    def learn_backward(self, ids: torch.Tensor) -> None:
        """Find out on an accelerator whether backward passes through the blocks have repeatable kernels, see
        ``strict``; a warning names the first operator that has none. Costs about four forwards of ``CHECKED`` tokens,
        and nothing on the processor.

        Args:
            ids: one window (1, length); after ``learn``.
        """
        if ids.device.type == "cpu":
            return
        ids, last = ids[:, :CHECKED], len(self.blocks) - 1
        states = self.outputs(ids, 0, None, last)
        for first, behind in [(0, last)] if self.handed else [(index, index) for index in range(last + 1)]:
            try:
                with ExitStack() as stack:
                    for index in range(first, behind + 1):
                        stack.enter_context(self._loaded(index))
                    self.backward(ids, first, states[first - 1] if first else None, behind,
                                  torch.ones_like(states[behind]))
            except RuntimeError as error:
                if "deterministic" not in str(error):
                    raise
                self.strict = False
                warnings.warn(f"gradients of {type(self.model).__name__} on {ids.device} may differ in their last bits "
                              f"from run to run: {one_line(error, 160)}", RuntimeWarning, stacklevel=2)
                return

    def _watch(self, ids: torch.Tensor) -> _Watched:
        watched, order, lengths = _Watched(), [], []

        def watching(index: int) -> Replacement:
            own = self._block(index)

            def forward(*args: Any, **kwargs: Any) -> Any:
                order.append(index)
                watched.arguments.append(leaves(args, kwargs))
                output = own(*args, **kwargs)
                lengths.append(len(output) if isinstance(output, (tuple, list)) else 0)
                watched.states.append(states_in(output).clone())
                return output
            return forward

        name = type(self.model).__name__
        try:
            watched.logits = self._run(ids, [watching(index) for index in range(len(self.blocks))])
        except TypeError as error:
            raise ImpqError(f"{name}: {one_line(error)}: {UNSUPPORTED}") from error
        if order != list(range(len(self.blocks))):
            raise ImpqError(f"{name} does more than run its blocks in order, once each: {UNSUPPORTED}")
        self._lengths = lengths
        shape = tuple(watched.states[-1].shape)
        axes = [axis for axis in range(len(shape) - 1) if shape[axis:axis + 2] == tuple(ids.shape)]
        if not axes:
            raise ImpqError(f"the last block of {name} returns hidden states of shape {shape} for a window of "
                            f"{ids.shape[1]} tokens: {UNSUPPORTED}")
        self.axis = axes[0]
        return watched

    def _handed(self, ids: torch.Tensor, plain: _Watched) -> str:
        """The first argument of a block that is another if the blocks in front answer from memory."""
        for first in range(1, len(self.blocks)):
            seen: list[dict[str, Any]] = []

            def answering(index: int, first: int = first, seen: list[dict[str, Any]] = seen) -> Replacement:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    seen.append(leaves(args, kwargs))
                    return self._answer(index, hidden_in(args, kwargs) if index < first - 1
                                        else plain.states[index].clone())
                return forward

            try:
                self._run(ids, [answering(index) for index in range(len(self.blocks))])
            except Exception as error:  # the model's code, given None for what a block returns beside its states
                return f"a value ({one_line(error, 80)})"
            for ours, theirs in zip(seen[first:], plain.arguments[first:], strict=True):
                if name := unlike(ours, theirs):
                    return name
        return ""

    def _agrees(self, ids: torch.Tensor, plain: _Watched) -> bool:
        """Whether a forward from the middle block on gives the plain forward's logits, to rounding."""
        middle, last = len(self.blocks) // 2, len(self.blocks) - 1
        ours = self.outputs(ids, middle, plain.states[middle - 1] if middle else None, last)[-1]
        logits = self.logits(ids.flatten(), self.rows(ours))
        difference = float((logits - plain.logits[0].float()).abs().max())
        return difference <= max(1e-4, 8 * torch.finfo(ours.dtype).eps) * float(plain.logits.abs().max())

    @torch.inference_mode()
    def first_input(self, ids: torch.Tensor) -> torch.Tensor:
        """The hidden states (windows, length, width) in front of the first block for token ids (windows, length)."""
        found: list[torch.Tensor] = []

        def catch(*args: Any, **kwargs: Any) -> Any:
            found.append(hidden_in(args, kwargs))
            raise _Stop

        self._run(ids, [catch])
        return found[0]

    @torch.inference_mode()
    def outputs(self, ids: torch.Tensor, first: int, states: torch.Tensor | None, last: int,
                around: Callable[[int, Callable[[], Any]], Any] = lambda index, run: run()) -> list[torch.Tensor]:
        """The states behind each of the blocks ``first`` to ``last``.

        Args:
            ids: token ids (windows, length).
            first: the first block that runs; those in front answer from memory, unless blocks hand a state to each
                other: then all run.
            states: output of block ``first - 1`` for those ids; None if ``first`` is 0.
            last: the forward ends behind this block.
            around: called with the index of each block that runs and the call that runs it, whose result it returns.
        """
        found: list[torch.Tensor] = []

        def running(index: int) -> Replacement:
            own = self._block(index)

            def forward(*args: Any, **kwargs: Any) -> Any:
                output = around(index, lambda: own(*args, **kwargs))
                if index == last:
                    found.append(states_in(output))
                    raise _Stop
                if index >= first:
                    found.append(states_in(output).clone())  # the code behind may write to it
                return output
            return forward

        kept = [] if self.handed else self._memory(first, states)
        self._run(ids, [*kept, *(running(index) for index in range(len(kept), last + 1))])
        return found

    def backward(self, ids: torch.Tensor, first: int, states: torch.Tensor | None, last: int,
                 gradient: torch.Tensor) -> torch.Tensor | None:
        """Run the blocks ``first`` to ``last`` once more, and backwards. Hooks on the outputs of their linears see the
        gradients. The blocks must be loaded for as long as this takes.

        Args:
            ids: token ids (windows, length).
            first: the first block that runs; 0 if blocks hand a state to each other.
            states: output of block ``first - 1``; None if ``first`` is 0.
            last: the last block that runs.
            gradient: of the loss in the states behind block ``last``.

        Returns:
            The gradient in ``states``; None if ``first`` is 0.
        """
        leaf = None if states is None else states.clone().requires_grad_()  # a tensor of inference mode has no graph
        found: list[torch.Tensor] = []

        def running(index: int) -> Replacement:
            own = self._block(index)

            def forward(*args: Any, **kwargs: Any) -> Any:
                if index == 0:  # no parameter requires a gradient, so the graph must start here
                    args, kwargs = with_hidden(args, kwargs, hidden_in(args, kwargs).clone().requires_grad_())
                output = own(*args, **kwargs)
                if index == last:
                    found.append(states_in(output))
                    raise _Stop
                return output
            return forward

        self._run(ids, [*self._memory(first, leaf), *(running(index) for index in range(first, last + 1))], graph=True)
        with repeatable(ids.device, self.strict):
            torch.autograd.backward(found, [gradient.clone()])
        return None if leaf is None else leaf.grad

    def rows(self, states: torch.Tensor, count: int | None = None) -> torch.Tensor:
        """Hidden states of the first ``count`` positions (all by default) of each window in a single row of positions:
        (windows * count, width), the windows and positions at ``axis``."""
        count = states.shape[self.axis + 1] if count is None else count
        return states.narrow(self.axis + 1, 0, count).flatten(self.axis, self.axis + 1)

    def from_rows(self, rows: torch.Tensor, windows: int, length: int) -> torch.Tensor:
        """Hidden states of ``length`` positions whose first positions are ``rows``, the others zero: the inverse of
        ``rows``."""
        states = rows.unflatten(self.axis, (windows, -1))  # type: ignore[no-untyped-call]
        shape = list(states.shape)
        shape[self.axis + 1] = length - shape[self.axis + 1]
        return torch.cat([states, states.new_zeros(shape)], dim=self.axis + 1)

    def logits(self, ids: torch.Tensor, rows: torch.Tensor, stop: bool = False) -> torch.Tensor:
        """Float32 logits (positions, vocabulary) of the last block's output, by whatever the model has behind its last
        block. All blocks answer from memory, and each position is a window of its own, so the memory that this takes is
        that of its logits. They have a graph if ``rows`` requires a gradient.

        Args:
            ids: token ids (positions,).
            rows: output (positions, width) of the last block for them, as ``rows`` returns it.
            stop: end the forward at the last block, without logits (for counting what the rest takes).
        """
        forwards = self._memory(len(self.blocks), rows.unsqueeze(self.axis + 1))
        if stop:
            def end(*args: Any, **kwargs: Any) -> Any:
                raise _Stop
            forwards[-1] = end
        logits = self._run(ids[:, None], forwards, graph=rows.requires_grad)
        with torch.inference_mode(not rows.requires_grad):
            return logits.flatten(0, 1).float() if not stop else logits

    def head_inputs(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The inputs (positions, width) of the head, by whatever the model has between its last block and its head.

        Args:
            ids: token ids (positions,).
            rows: output (positions, width) of the last block for them, as ``rows`` returns it.
        """
        found: list[torch.Tensor] = []

        def catch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0].flatten(0, -2))
            raise _Stop

        handle = ends_of(self.model).head.register_forward_pre_hook(catch)
        try:
            self._run(ids[:, None], self._memory(len(self.blocks), rows.unsqueeze(self.axis + 1)))
        finally:
            handle.remove()
        return found[0]

    def check_ends(self, ids: torch.Tensor) -> None:
        """Check that hidden states are all that the blocks, and all behind them but a tied head, have of the embedding:
        blocks that answer from memory while tokens are embedded as others are must be called with the same arguments.
        Costs about a forward of ``CHECKED`` tokens.

        Args:
            ids: one window (1, length).

        Raises:
            ImpqError: they have more of it, such as inputs for each layer.
        """
        ids, ends = ids[:, :CHECKED], ends_of(self.model)
        plain, called = self._watch(ids), list[dict[str, Any]]()

        def answering(index: int) -> Replacement:
            def forward(*args: Any, **kwargs: Any) -> Any:
                called.append(leaves(*with_hidden(args, kwargs, plain.states[index - 1] if index else before)))
                return self._answer(index, plain.states[index].clone())
            return forward

        before = self.first_input(ids)
        own = ends.embedding._parameters["weight"]
        assert own is not None
        try:
            ends.embedding._parameters["weight"] = nn.Parameter(own.roll(1, 0), requires_grad=False)
            logits = self._run(ids, [answering(index) for index in range(len(self.blocks))])
        finally:
            ends.embedding._parameters["weight"] = own
        different = not torch.equal(logits, plain.logits)
        if not self.handed:  # else every forward runs all blocks
            different = different or any(
                unlike(ours, theirs) for ours, theirs in zip(called, plain.arguments, strict=True))
        if different:
            raise ImpqError(f"embedding and head of {type(self.model).__name__} cannot be quantized: it reads its "
                            "embedding more than once; leave out --quantize-embeddings")

    def _memory(self, count: int, states: torch.Tensor | None) -> list[Replacement]:
        """Forwards for the first ``count`` blocks: the last of them answers with ``states``, the others with their
        input, which nothing reads."""
        def answering(index: int) -> Replacement:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if index < count - 1:
                    return self._answer(index, hidden_in(args, kwargs))
                assert states is not None
                return self._answer(index, states.clone())  # the code behind may write to it
            return forward
        return [answering(index) for index in range(count)]

    def _answer(self, index: int, states: torch.Tensor) -> Any:
        """Return value of block ``index``: states, alone or at the head of a tuple."""
        length = self._lengths[index]
        return (states, *[None] * (length - 1)) if length else states

    def _block(self, index: int) -> Replacement:
        """The own forward of a block, at which the block is loaded."""
        own = self.blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._loaded(index):
                return own(*args, **kwargs)
        return forward

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The context in which other code can call the model: each block has its weights while it works."""
        with _replaced(self.blocks, [self._block(index) for index in range(len(self.blocks))]):
            yield self.model

    def _run(self, ids: torch.Tensor, forwards: Sequence[Replacement], graph: bool = False) -> torch.Tensor:
        """Logits (windows, length, vocabulary) of a forward with the first blocks' forwards replaced; empty if one of
        those ended it. A model that has no ``use_cache`` is not given it.

        Args:
            ids: token ids (windows, length).
            forwards: of the first blocks.
            graph: keep what a backward pass reads.
        """
        options = {"use_cache": False} if "use_cache" in self._accepted else {}
        with _replaced(self.blocks[:len(forwards)], forwards), repeatable(ids.device), (
                torch.enable_grad() if graph else torch.inference_mode()):
            try:
                logits: torch.Tensor = self.model(input_ids=ids, **options).logits
                return logits
            except _Stop:
                return torch.empty(0)


@contextmanager
def _replaced(blocks: Sequence[nn.Module], forwards: Sequence[Replacement]) -> Iterator[None]:
    kept = [vars(block).get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            vars(block)["forward"] = forward
        yield
    finally:
        for block, own in zip(blocks, kept, strict=True):
            if own is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = own
