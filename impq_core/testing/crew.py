"""A crew in the process itself, for tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar

from impq_core.hookspecs import Component, hookimpl
from impq_core.interfaces import Answer, Crew, Order, Task
from impq_core.worker import Worker


class InProcess(Crew):
    """Workers that take turns in this process, each with a model of its own. What passes between them and the leader
    goes through JSON, and the answers of a round arrive in reverse.

    Attributes:
        carried: number of tasks of each kind that all crews of this process carried out; tests clear it.
    """

    carried: ClassVar[Counter[str]] = Counter()

    def open(self, workers: str, threads: int, accelerated: bool) -> None:
        """Make the workers, whose number is given."""
        self._workers = [Worker() for _ in range(int(workers))]

    def carry_out(self, order: Order, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer]]:
        """Rounds with a task for each worker."""
        waiting = iter(tasks)
        while some := list(islice(waiting, len(self._workers))):
            done = []
            for worker, task in zip(self._workers, some, strict=False):
                self.carried[task["kind"]] += 1
                done.append((task, _sent(worker.carry_out(_sent(order), _sent(task)))))
            yield from reversed(done)

    def close(self) -> None:
        """Let them go."""
        self._workers.clear()


class InProcessPlugin:
    """Offers ``inprocess``: an observer for ``Plugins.watch``, and then ``--workers inprocess://2``."""

    @hookimpl
    def impq_crews(self) -> list[Component]:
        """The crew."""
        return [Component("inprocess", "impq_core.testing.crew:InProcess", "workers in this process")]


def _sent(data: Any) -> Any:
    return json.loads(json.dumps(data))
