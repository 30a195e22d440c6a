"""The base classes of parts: estimator, surrogate, allocator, refiner, backend, exporter, meter and
crew. Imports no torch.

A search space has n layers and m choices; a *pick* (n,) has the number of a choice for each layer, 0 being the widest.
Costs are counted in *forwards*: one forward is the whole model over the windows of the game (``model/cost.py``).

A plugin's class derives from one of these. Its options are a frozen dataclass named ``Options``: each field is an
option ``-o name=value``, and ``__post_init__`` raises ValueError if a value is invalid. Heavy libraries are imported
inside the methods, so that a typo on the command line is reported before they load.
"""

from impq_core.interfaces.backend import Backend, Statistics, Variant
from impq_core.interfaces.crew import Answer, CarryOut, Crew, Order, Task
from impq_core.interfaces.estimator import (
    Drift,
    Estimator,
    Game,
    GameEstimator,
    Inspector,
    Probe,
    Sampler,
    unknown_drift,
)
from impq_core.interfaces.exporter import EVERY_BACKEND, Checkpoint, Exporter
from impq_core.interfaces.meter import Form, Meter, Readings, Stored
from impq_core.interfaces.part import NO_FILE, InputFile, NoOptions, Part
from impq_core.interfaces.planner import Allocator, Refiner, Surrogate

__all__ = ["EVERY_BACKEND", "NO_FILE", "Allocator", "Answer", "Backend", "CarryOut", "Checkpoint", "Crew", "Drift",
           "Estimator", "Exporter", "Form", "Game", "GameEstimator", "InputFile", "Inspector", "Meter", "NoOptions",
           "Order", "Part", "Probe", "Readings", "Refiner", "Sampler", "Statistics", "Stored", "Surrogate", "Task",
           "Variant", "unknown_drift"]
