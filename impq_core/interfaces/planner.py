"""The parts between measurements and plan: surrogate, allocator, refiner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from impq_core.costs import Cost
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
    """Turns an estimate into a plan.

    Class attributes:
        takes_limits: whether ``allocate`` takes ``limits``. If not, runs with ``--limit`` are refused, and the argument
            is never given, so that ``allocate`` may lack it.
    """

    takes_limits: ClassVar[bool] = False
    returns = MappingProxyType({"allocate": (Plan,)})

    @abstractmethod
    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int, limits: Sequence[Cost] = ()) -> Plan:
        """The plan of least predicted loss that was found within the budget.

        Args:
            estimate: the estimate.
            budget_bytes: of the plan, pinned layers included.
            limits: further costs of the layers at the choices, each with a limit, which the plan keeps
                (``costs.fits``).

        Raises:
            ImpqError: the budget is below the smallest pick, or no pick is within budget and limits.
        """


class Refiner(Part, ABC):
    """Improves a plan by measuring other plans near it.

    Class attributes:
        takes_limits: whether the plan stays within the limits of ``plan.costs``. If not, runs with ``--limit`` are
            refused.
    """

    takes_limits: ClassVar[bool] = False
    returns = MappingProxyType({"refine": (Plan,)})

    @abstractmethod
    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: np.random.Generator) -> Plan:
        """The start, or a plan within its budget and limits (``Plan.admits``) that ``referee`` accepted.

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
