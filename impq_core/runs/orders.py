"""The leader's side of workers: what they prepare themselves from for a run, and the crew that has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from impq_core.config import RunConfig
from impq_core.interfaces import Order
from impq_core.model.demo import cache_folder
from impq_core.parts import load_crew
from impq_core.plugins import Plugins
from impq_core.runs.prepare import Prepared
from impq_core.runs.session import Share
from impq_core.trust import Trust

LEADERS = ("workers", "tracking_uri", "experiment", "output")
"""Settings that only the leader has."""


def order_of(prepared: Prepared, plugins: Plugins, trust: Trust) -> Order:
    """What a worker prepares itself from for a run: configuration, key, readings of meters, plugin files, permissions,
    the number of threads, the processor's vector instructions, whether a calibration text is read, and the cache."""
    defaults = RunConfig()
    config = replace(prepared.config, **{name: getattr(defaults, name) for name in LEADERS},
                     device=torch.device(prepared.config.device).type)  # each worker has accelerators of its own
    return {"config": config.to_data(), "key": prepared.key.to_dict(),
            "meters": [metering.to_dict() for metering in prepared.meterings],
            "plugins": [str(file) for file in plugins.files], "remote_code": trust.remote_code,
            "threads": prepared.config.threads or torch.get_num_threads(),
            "processor": torch.backends.cpu.get_cpu_capability(),  # torch's sums on it differ in their last bits
            "calibrate": prepared.calibration is not None, "cache": str(cache_folder())}


def with_workers(config: RunConfig, workers: str, threads: int = 0) -> RunConfig:
    """The configuration of what goes on with other workers, if they are not empty.

    Args:
        config: of the run. The number of its threads, on which sums depend, stays what it was.
        workers: as on the command line.
        threads: another number of threads; 0 for the same.
    """
    if workers:
        return replace(config, workers=workers, threads=threads or config.threads or torch.get_num_threads())
    return replace(config, threads=threads or config.threads)


@contextmanager
def workers_of(config: RunConfig, plugins: Plugins, trust: Trust) -> Iterator[Share | None]:
    """The workers of a configuration: a function that gives those that carry out the tasks of a prepared run; None if
    there are none.

    Raises:
        ImpqError: they cannot be started.
    """
    crew = load_crew(config, plugins)
    if crew is None:
        yield None
        return
    try:
        crew.open(config.workers.partition("://")[2] or config.workers, config.threads or torch.get_num_threads(),
                  accelerated=torch.device(config.device).type != "cpu")
        yield lambda prepared: partial(crew.carry_out, order_of(prepared, plugins, trust))
    finally:
        crew.close()
