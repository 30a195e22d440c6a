"""The crew of Ray: an actor for each worker, which Ray starts again if it dies."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

from impq_core.errors import ImpqError, one_line
from impq_core.interfaces import Answer, Crew, Order, Task

TRIES = 9
"""How often a task that its worker died of, or beside, is given to a worker again."""

OWNER = "owner has died"
"""What Ray says of an actor if the part of the cluster on this machine is gone."""

BEAT = 1.0
"""Seconds between two looks at whether the cluster is still there."""

STORE = 100 * 2**20
"""Bytes of Ray's store of objects: tasks and answers are small, and weights are mapped from files."""

SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0",
            "RAY_worker_niceness": "0"}
"""No statistics for Ray's makers; accelerators are left visible to workers that take none; workers have the priority of
this process, where Ray's own 15 would leave them what the leader and other processes do not take."""


class Hand:
    """A worker in a process of Ray. An error that the user can correct is an answer, too: Ray would wrap it."""

    def __init__(self) -> None:
        self._worker: Any = None

    def carry_out(self, order: Order, task: Task) -> tuple[str, Any]:
        """``answer`` and the answer, or ``error`` and its message."""
        try:
            if self._worker is None:  # an import that fails here is an answer, and no reason to try again
                from impq_core.worker import Worker

                self._worker = Worker()
            return "answer", self._worker.carry_out(order, task)
        except (ImpqError, ImportError) as error:
            return "error", one_line(error, 1000)


class Ray(Crew):
    """Workers are actors of Ray. Each takes an accelerator if the run is on one, else as many cores as it has threads.

    A number or ``auto`` starts Ray on this machine, for as long as the run lasts, or takes the one that this process
    has started or joined. An address is that of a cluster which this machine is part of, as ``ray start`` prints it;
    there are as many workers as the cluster has accelerators, or cores for their threads.

    Ray starts a worker that died again, and gives it its task once more. A cluster that is gone ends the run.
    """

    def open(self, workers: str, threads: int, accelerated: bool) -> None:
        """Start or join a cluster, and start the workers."""
        os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
        import ray

        quiet = {"logging_level": "error", "log_to_driver": False}
        local = workers == "auto" or workers.isdigit()
        self._own, self._lost, self._head, self._place, self._hands = not ray.is_initialized(), False, "", "", []
        try:
            if local:
                count, devices = _here(workers, threads, accelerated)
                if self._own:
                    ray.init(address="local", num_cpus=count * threads, num_gpus=devices, include_dashboard=False,
                             object_store_memory=STORE, **quiet)
            else:
                _require_answer(workers, f"no Ray cluster answers at {workers}: start one (ray start --head), and give "
                                         "the address that it prints")
                ray.init(address=workers, ignore_reinit_error=True, **quiet)
            there = {name: int(number) for name, number in ray.cluster_resources().items()}
        except ImpqError:
            raise
        except Exception as error:
            raise ImpqError(f"Ray cannot {'start' if local else f'join the cluster at {workers}'}: "
                            f"{one_line(error, 300)}") from error
        unit = (there.get("GPU", 0), 1) if accelerated else (there.get("CPU", 0), threads)
        if not local:
            count, devices = unit[0] // unit[1], there.get("GPU", 0)
        if not count or (not accelerated and count * threads > unit[0]):
            raise ImpqError(f"this Ray has {there.get('CPU', 0)} cores and {there.get('GPU', 0)} accelerators, too few "
                            f"for {max(count, 1)} workers of {threads} threads")
        self._place = "on this machine" if local else f"at {workers}"
        self._head = ray.get_runtime_context().gcs_address
        share = 1 / math.ceil(count / devices) if accelerated and devices else 0
        actor = ray.remote(num_cpus=0 if share else threads, num_gpus=share, max_restarts=-1, max_task_retries=TRIES)
        self._hands = [actor(Hand).remote() for _ in range(count)]

    def carry_out(self, order: Order, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer]]:
        """One task for each worker at a time."""
        import ray

        waiting, free, looked = iter(tasks), list(self._hands), time.monotonic()
        running: dict[Any, tuple[Any, Task]] = {}
        try:
            while True:
                while free and (task := next(waiting, None)) is not None:
                    hand = free.pop()
                    running[hand.carry_out.remote(order, task)] = hand, task
                if not running:
                    return
                done, _ = ray.wait([*running], timeout=BEAT)
                if not done or time.monotonic() > looked + BEAT:
                    self._look()
                    looked = time.monotonic()
                for reference in done:
                    hand, task = running.pop(reference)
                    kind, answer = ray.get(reference)
                    if kind == "error":
                        raise ImpqError(answer)
                    free.append(hand)
                    yield task, answer
        except ray.exceptions.RayTaskError:  # a bug, with the worker's traceback
            raise
        except (ray.exceptions.RayError, ConnectionError) as error:
            self._look(OWNER in str(error))
            raise ImpqError(f"a task failed on its workers {TRIES + 1} times (is there enough memory?): "
                            f"{one_line(error, 300)}") from error

    def _look(self, lost: bool = False) -> None:
        """Raises ImpqError if the cluster is gone, or ``lost`` says so."""
        message = f"the Ray cluster {self._place} is gone: what was measured is kept, and impq run --resume goes on"
        try:
            _require_answer(self._head, message)
        except ImpqError:
            self._lost = True
            raise
        if lost:
            self._lost = True
            raise ImpqError(message)

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        import ray

        if ray.is_initialized():
            with contextlib.suppress(ImpqError):  # it may have gone since its last answer, and is only left then
                self._look()
            for hand in () if self._lost else self._hands:
                ray.kill(hand)
            if self._own:
                ray.shutdown()


def _here(workers: str, threads: int, accelerated: bool) -> tuple[int, int]:
    """Numbers of workers and of accelerators of this machine."""
    devices = 0
    if accelerated:
        import torch

        devices = torch.accelerator.device_count()
    if workers == "auto":
        return devices or max(1, (os.cpu_count() or 1) // threads), devices
    return int(workers), devices


def _require_answer(address: str, message: str) -> None:
    """Raises ImpqError if nothing listens at an address. Ray itself would end this process after a minute."""
    host, _, port = address.rpartition(":")
    for attempt in range(3):
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except (OSError, ValueError, OverflowError):
            time.sleep(0.2 * attempt)
    raise ImpqError(message)
