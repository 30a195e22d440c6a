"""Many assignments in one pass over the blocks: at each block, each distinct prefix of choices is run once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from impq_core.model.bank import Assignment, Bank
from impq_core.model.blockwise import BlockwiseModel, Hidden
from impq_core.space import Choice


@dataclass(frozen=True, eq=False)
class Prefix:
    """Hidden states of one assignment, as far as they are known.

    Args:
        assignment: the choices; None if only the first block's input is known.
        inputs: the input of each block from the first on, and of the head if it is a layer; later ones may be missing.
            The first block's is not read if the embedding is a layer: its choice decides it.
    """

    assignment: Assignment | None
    inputs: Sequence[Hidden]


class Walk:
    """Runs assignments of a bank's layers through the blocks of a model, side by side.

    The assignments are a tree: those with the same choices up to a block have the same states behind it. A block is
    loaded once for each distinct combination of its layers' choices, so a variant is unpacked once, whatever the number
    of assignments and of windows. The states behind a block do not depend on what else is walked, bit for bit. An
    embedding that is a layer counts as one of the first block.

    Args:
        runner: the model.
        bank: its variants.
    """

    def __init__(self, runner: BlockwiseModel, bank: Bank) -> None:
        self._runner, self._bank = runner, bank
        # A linear that several blocks share is in the layer of the first of them, and decides the states behind each.
        self._layers = [[i for i, layer in enumerate(bank.layers)
                         if any(bank.module(linear) in modules for linear in layer.linears)]
                        for modules in (set(block.modules()) for block in runner.blocks)]
        if bank.embedding is not None:
            self._layers[0].insert(0, bank.embedding)
        # Where a walk may begin at the latest: the states behind the last block are kept only for a head with choices.
        self._latest = len(runner) if bank.head not in (None, bank.embedding) else len(runner) - 1

    def outputs(self, assignments: Sequence[Assignment], known: Prefix, keep: bool = False,
                progress: Callable[[int], None] = lambda block: None) -> tuple[list[Hidden], Prefix]:
        """The last block's output for each assignment.

        Args:
            assignments: at least one.
            known: the first block's input, and what is known of one assignment. An assignment begins at the first block
                with another choice; without partial forwards, at the first block.
            keep: keep the states in front of every block, and of a head that is a layer, for the last assignment.
            progress: called with each block that all assignments have passed.

        Returns:
            The outputs, and what is then known of the last assignment: without ``keep``, the first block's input.
        """
        if not self._runner.partial:
            return self._one_by_one(assignments, known.inputs[0], progress), Prefix(assignments[-1], known.inputs[:1])
        begins = [min(self._first_difference(known.assignment, assignment), len(known.inputs) - 1)
                  for assignment in assignments]
        states: dict[int, Hidden] = {}
        at: list[int] = [-1] * len(assignments)  # the place of each assignment's states; -1 is a known state
        inputs = list(known.inputs[:begins[-1] + 1 if keep else 1])
        for block in range(min(begins), len(self._runner)):
            passing = [k for k, begin in enumerate(begins) if begin <= block]
            groups: dict[tuple[Choice | None, ...], dict[int, list[int]]] = {}
            for k in self._embedding_in_turn(assignments, passing) if block == 0 else passing:
                groups.setdefault(self._choices(assignments[k], block), {}).setdefault(at[k], []).append(k)
            uses = Counter(place for prefixes in groups.values() for place in prefixes)
            found: dict[int, Hidden] = {}
            for choices, prefixes in groups.items():
                for layer, choice in zip(self._layers[block], choices, strict=True):
                    self._bank.switch(layer, choice)
                with self._runner.placement.loaded(block):
                    for place, members in prefixes.items():
                        uses[place] -= 1
                        if place < 0:
                            before = known.inputs[block]
                        else:  # the last use of states ends their memory
                            before = states[place] if uses[place] else states.pop(place)
                        number = len(found)
                        found[number] = self._runner.run(block, before)
                        for k in members:
                            at[k] = number
            states = found
            if keep and begins[-1] <= block < self._latest:
                inputs.append(states[at[-1]])
            progress(block)
        return [known.inputs[-1] if place < 0 else states[place] for place in at], Prefix(assignments[-1], inputs)

    def by_head(self, assignments: Sequence[Assignment]) -> Iterator[list[int]]:
        """Numbers of assignments, in groups with the same choice of the head, which it has meanwhile. If the head is no
        layer, all are in one group."""
        head = self._bank.head
        if head is None:
            yield list(range(len(assignments)))
            return
        for choice, numbers in _grouped(assignments, range(len(assignments)), head).items():
            self._bank.switch(head, choice)
            yield numbers

    def heads(self, assignments: Sequence[Assignment]) -> int:
        """The number of groups of ``by_head``."""
        return 1 if self._bank.head is None else len({assignment[self._bank.head] for assignment in assignments})

    def runs(self, assignments: Iterable[Assignment], known: Assignment | None) -> list[int]:
        """How many times ``outputs`` runs each block, if every input of ``known`` is known; without partial forwards,
        each block once for each assignment."""
        assignments = list(assignments)
        if not self._runner.partial:
            return [len(assignments)] * len(self._runner)
        counts = [0] * len(self._runner)
        numbers: dict[tuple[int, tuple[Choice | None, ...]], int] = {}  # of prefixes, by the prefix one block shorter
        counted: set[int] = set()
        for assignment in assignments:
            first = self._first_difference(known, assignment)
            prefix = 0
            for block in range(len(self._runner)):
                prefix = numbers.setdefault((prefix, self._choices(assignment, block)), len(numbers) + 1)
                if block >= min(first, self._latest) and prefix not in counted:
                    counted.add(prefix)
                    counts[block] += 1
        return counts

    def _one_by_one(self, assignments: Sequence[Assignment], hidden: Hidden,
                    progress: Callable[[int], None]) -> list[Hidden]:
        outputs = []
        for number, assignment in enumerate(assignments, start=1):
            self._bank.apply(assignment)
            outputs.append(self._runner.run_all(hidden))
            progress(number * len(self._runner) // len(assignments) - 1)
        return outputs

    def _embedding_in_turn(self, assignments: Sequence[Assignment], numbers: Sequence[int]) -> list[int]:
        """Numbers of assignments, those with the same choice of the embedding behind each other: it is unpacked once
        for each choice."""
        if self._bank.embedding is None:
            return list(numbers)
        return [k for same in _grouped(assignments, numbers, self._bank.embedding).values() for k in same]

    def _choices(self, assignment: Assignment, block: int) -> tuple[Choice | None, ...]:
        return tuple(assignment[layer] for layer in self._layers[block])

    def _first_difference(self, known: Assignment | None, assignment: Assignment) -> int:
        """The first block in which an assignment differs from one that is known; the number of blocks if in none."""
        return next((block for block in range(len(self._runner))
                     if known is None or self._choices(known, block) != self._choices(assignment, block)),
                    len(self._runner))


def _grouped(assignments: Sequence[Assignment], numbers: Iterable[int], layer: int) -> dict[Choice | None, list[int]]:
    """Numbers of assignments by a layer's choice."""
    groups: dict[Choice | None, list[int]] = {}
    for k in numbers:
        groups.setdefault(assignments[k][layer], []).append(k)
    return groups
