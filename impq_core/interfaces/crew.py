"""Crews: processes that carry out the tasks of a run, here or on other machines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from impq_core.interfaces.part import Part

Order = Mapping[str, Any]
"""What a worker prepares itself from, as plain data: the run's configuration, its key, and the leader's threads."""

Task = Mapping[str, Any]
"""A piece of a run's work, as plain data; ``kind`` names it. It does not depend on the number of workers."""

Answer = Mapping[str, Any]
"""What a task found, as plain data."""

CarryOut = Callable[[Iterable[Task]], Iterator[tuple[Task, Answer]]]
"""Has tasks carried out, and yields each with its answer as soon as it is there, in any order."""


class Crew(Part, ABC):
    """Workers that carry out tasks for a leader, which is the process of the run.

    A worker is a process with an ``impq_core.worker.Worker``, whose ``carry_out(order, task)`` returns the answer.
    It may die at any moment: its task is then given to a worker once more, with the same answer. Workers write variants
    into the cache and nothing else; ledgers, plan and MLflow are the leader's.

    A crew is chosen by ``--workers``: the one with the name of the address's scheme (``ray://10.0.0.1:6379``), or for a
    number and ``auto`` the first one installed.
    """

    @abstractmethod
    def open(self, workers: str, threads: int, accelerated: bool) -> None:
        """Start the workers, or connect to those of a cluster; returns before they have loaded a model.

        Args:
            workers: a number, ``auto`` for what the machine has, or an address without its scheme.
            threads: threads of the processor that a worker takes.
            accelerated: whether a worker takes an accelerator.

        Raises:
            ImpqError: they cannot be started, or no cluster is there.
        """

    @abstractmethod
    def carry_out(self, order: Order, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer]]:
        """Have tasks carried out; each is yielded with its answer as soon as that is there, in any order.

        Args:
            order: what the workers prepare themselves from.
            tasks: taken one by one, each when a worker is free for it.

        Raises:
            ImpqError: a worker refuses the order, a task fails on every worker, or all workers are gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Let the workers go. Called once, also after an error."""
