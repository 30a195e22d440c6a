"""The readings of meters for a run: which layers in which forms they are asked for, and what they found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from impq_core.costs import UNQUANTIZED, Cost, Metering, with_limits
from impq_core.errors import ImpqError
from impq_core.feasible import require_fitting
from impq_core.interfaces import Backend, Form, Meter, Stored
from impq_core.model.ends import end_layers
from impq_core.model.shapes import share_of_experts
from impq_core.references import Mix
from impq_core.space import Choice, LayerSpec, SearchSpace

_EXPERT = re.compile(r"\.experts\.")


def forms_of(model: PreTrainedModel, space: SearchSpace, backend: Backend, item: int,
             between: Iterable[Choice] = (), mixes: Iterable[Mix] = ()) -> tuple[Form, ...]:
    """Every form of which a run shows the cost: each layer at each choice of the menu and unquantized, pins, uniform
    references, mixes, and the embedding and the head if they are no layers.

    Args:
        model: the model, which may be on the meta device.
        space: layers and choices of the plans.
        backend: of the plans.
        item: bytes of a number that stays unquantized.
        between: further choices of uniform references.
        mixes: plans of other software.
    """
    share, tied = share_of_experts(model.config.get_text_config(decoder=True)), _tied(model)

    def form(layer: LayerSpec, choice: Choice | None) -> Form:
        linears = []
        for linear in layer.linears:
            stored = backend.stand_in(linear, choice) if choice else None
            nbytes = backend.nbytes(linear, stored) if stored else item * linear.parameters
            reads = share if _EXPERT.search(f".{linear.name}.") else 1.0
            if layer.block < 0 and not tied:
                reads = 1 / linear.rows
            linears.append(Stored(linear, stored, nbytes, reads))
        return Form(layer, choice, tuple(linears))

    asked: list[tuple[LayerSpec, Choice | None]] = []
    for layer in space.layers:
        asked += [(layer, choice) for choice in (*space.choices, *between, None)]
    for pin in space.pinned:
        asked += [(pin.layer, pin.choice), (pin.layer, None)]
    blocks = {linear.name: layer.block for layer in space.everyone for linear in layer.linears}
    linears = {linear.name: linear for layer in space.everyone for linear in layer.linears}
    for mix in mixes:
        asked += [(LayerSpec(name, blocks[name], (linears[name],)), choice) for name, choice in mix.choices.items()]
    asked += [(end, None) for end in _other_ends(model, space)]
    unique = {(layer.name, choice.name if choice else UNQUANTIZED): (layer, choice) for layer, choice in asked}
    return tuple(form(layer, choice) for layer, choice in unique.values())


def _tied(model: PreTrainedModel) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and getattr(embedding, "weight", None) is getattr(head, "weight", None)


def _other_ends(model: PreTrainedModel, space: SearchSpace) -> list[LayerSpec]:
    """The embedding and the head, unless they are layers of the space or of a class that no layer can be."""
    try:
        ends = end_layers(model)
    except ImpqError:
        return []
    names = {layer.name for layer in space.everyone}
    return [end for end in ends if end.name not in names]


def read_meters(meters: Mapping[str, Meter], model: PreTrainedModel, space: SearchSpace, forms: Sequence[Form],
                dtype: str, progress: Callable[[int, int], None]) -> tuple[Metering, ...]:
    """What each meter finds; the embedding and the head are in ``rest`` unless they are layers.

    Args:
        meters: by name.
        model: the model, which may be on the meta device.
        space: layers and choices of the plans.
        forms: of ``forms_of``.
        dtype: type of unquantized numbers.
        progress: called with finished and all parts of a meter's work.

    Raises:
        ImpqError: a meter failed, or does not know a layer that plans need.
    """
    others = {end.name for end in _other_ends(model, space)}
    found = []
    for name, meter in meters.items():
        readings = meter.read(forms, dtype, progress)
        if len(readings.values) != len(forms):
            raise ImpqError(f"meter '{name}' returned {len(readings.values)} readings for {len(forms)} forms: this is "
                            "a bug of that plugin")
        errors = np.zeros(len(forms)) if readings.stderr is None else np.nan_to_num(readings.stderr)
        values: dict[str, dict[str, tuple[float, float]]] = {}
        rest, rest_stderr, notes = readings.rest, readings.rest_stderr, list(readings.notes)
        for form, value, error in zip(forms, readings.values.tolist(), errors.tolist(), strict=True):
            if form.layer.name in others:
                if np.isnan(value):
                    notes.append(f"without {form.layer.name}, which the meter does not know")
                else:
                    rest, rest_stderr = rest + value, rest_stderr + error
            elif not np.isnan(value):
                key = form.choice.name if form.choice else UNQUANTIZED
                values.setdefault(form.layer.name, {})[key] = (value, error)
        found.append(Metering(name, meter.cost, meter.unit, values, rest, rest_stderr, tuple(notes)))
    return tuple(found)


def costs_of(meterings: Iterable[Metering], space: SearchSpace, limits: Mapping[str, str], budget_bytes: int,
             budget: str) -> tuple[Cost, ...]:
    """The costs of a space's plans with their limits.

    Args:
        meterings: what meters found.
        space: layers and choices.
        limits: texts such as ``9ms``, by the name of the cost.
        budget_bytes: of the plan.
        budget: as the user wrote it.

    Raises:
        ImpqError: a meter does not know a layer at a choice of the menu.
        UsageError: no plan is within budget and limits.
    """
    costs = with_limits((metering.on(space) for metering in meterings), limits)
    require_fitting(space, budget_bytes, [cost for cost in costs if cost.is_limited], budget)
    return costs



def to_data(meterings: Iterable[Metering]) -> dict[str, Any]:
    """The data of a run's costs.json."""
    return {"format": "impq-costs/1", "meters": [metering.to_dict() for metering in meterings]}
