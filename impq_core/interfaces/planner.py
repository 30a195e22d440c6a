"""The parts between measurements and plan: surrogate, allocator, refiner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MappingProxyType

import numpy as np

from impq_core.interfaces.estimator import Game
from impq_core.interfaces.part import Part
from impq_core.types import Measurements, Plan, SensitivityEstimate


class Surrogate(Part, ABC):
    """Fits an estimate to measured losses."""

    returns = MappingProxyType({"fit": (SensitivityEstimate,)})

    @abstractmethod
    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The fitted estimate; raises ImpqError if the measurements are too few or not finite."""


class Allocator(Part, ABC):
    """Turns an estimate into a plan."""

    returns = MappingProxyType({"allocate": (Plan,)})

    @abstractmethod
    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """The plan of least predicted loss that was found within the budget.

        Raises:
            ImpqError: the budget is below the smallest pick.
        """


class Refiner(Part, ABC):
    """Improves a plan by measuring other plans near it."""

    returns = MappingProxyType({"refine": (Plan,)})

    @abstractmethod
    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: np.random.Generator) -> Plan:
        """The start, or a plan within its budget that ``referee`` accepted.

        Args:
            plan: the start.
            estimate: costs of the layers; None if the user gave the plan (``--plan``).
            game: proposals are measured on it.
            referee: the same model on windows that no proposal was chosen by. A plan is accepted only if its loss
                there is below the current plan's by more than the standard error of the difference, paired over
                windows.
            forwards: the limit for both games together, in full-model forwards of the game's windows.
            rng: the source of every random draw.
        """
