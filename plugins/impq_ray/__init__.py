"""Workers by Ray: on this machine, or on those of a cluster."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_crews() -> list[Component]:
    """``ray``."""
    return [Component("ray", "impq_ray.crew:Ray", "workers on this machine or on a cluster (Ray)", ("ray",), "ray")]
