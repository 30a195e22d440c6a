"""Tasks side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from impq_core.model.threads import side_by_side


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "the number of threads was not restored"
    torch.set_num_threads(before)


def test_results_come_in_order_from_tasks_with_one_thread_each(threads: int) -> None:
    def task(number: int) -> Callable[[], tuple[int, int, bool]]:
        return lambda: (number, torch.get_num_threads(), torch.is_grad_enabled())

    with torch.no_grad():
        found = list(side_by_side([task(number) for number in range(7)]))
    assert found == [(number, 1, False) for number in range(7)]
    assert list(side_by_side([])) == []


def test_as_many_tasks_run_at_a_time_as_there_are_threads(threads: int) -> None:
    together = threading.Barrier(threads, timeout=20)  # breaks if fewer run at a time
    list(side_by_side([together.wait] * threads))
    running, most, lock = 0, 0, threading.Lock()

    def task() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        torch.randn(300, 300) @ torch.randn(300, 300)
        with lock:
            running -= 1

    list(side_by_side([task] * 12))
    assert most <= threads


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(700, 300, generator=generator) for _ in range(5)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(list(side_by_side([lambda x=x: (x.T @ x).cholesky_inverse().sum(0) for x in inputs])))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_the_first_error_is_raised_and_tasks_that_have_not_begun_do_not_run(threads: int) -> None:
    ran: list[int] = []

    def task(number: int) -> None:
        if number in (1, 3):
            raise ValueError(str(number))
        time.sleep(0.01)
        ran.append(number)

    with pytest.raises(ValueError, match="1"):
        list(side_by_side([lambda number=number: task(number) for number in range(100)]))
    assert 0 in ran and len(ran) < 90
