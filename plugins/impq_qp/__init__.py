"""The quadratic program of IMPQ / CoopQ (arXiv 2509.15455), solved by Pyomo and HiGHS."""

from impq_core.hookspecs import Component, hookimpl


@hookimpl
def impq_allocators() -> list[Component]:
    """``qp``."""
    return [Component("qp", "impq_qp.program:QuadraticProgram",
                      "local search, then a bound by convex relaxations, Pyomo and HiGHS", needs=("pyomo", "highspy"))]
