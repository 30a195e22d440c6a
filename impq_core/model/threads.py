"""Independent tasks side by side, each on one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(tasks: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Yields the results of independent tasks, in their order. As many run at a time as torch has threads.

    Every task runs on one torch thread, also if it is the only one, so that the bits of its result do not depend on the
    number of threads. Two threads on one task wait for each other at every operation, which is slow on a busy machine.
    Tasks run under the caller's mode of gradients. The number of torch threads is the caller's again afterwards.

    Raises:
        Exception: that of the first task, in their order, that raised one. Tasks that have not begun by then do not
            run.
    """
    workers, gradients = torch.get_num_threads(), torch.is_grad_enabled()

    def begin() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(gradients)  # like the number of threads, a setting of each Python thread

    pool = ThreadPoolExecutor(workers, initializer=begin)
    try:
        torch.set_num_threads(1)  # also for libraries that have one number for all threads
        futures = deque(pool.submit(task) for task in tasks)
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(workers)
