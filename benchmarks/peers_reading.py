"""The widths that other tools chose, read from what they put out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from impq_core.errors import ImpqError

Widths = dict[str, int]
"""Bits of each linear, by its module name."""


def of_autoscheme(raw: Mapping[str, Mapping[str, Any]], **_: Any) -> Widths:
    """auto-round's ``layer_config``: a scheme for each linear."""
    return {name: int(scheme["bits"]) for name, scheme in raw.items()}


def of_modelopt(raw: Sequence[Mapping[str, Any]], **_: Any) -> Widths:
    """ModelOpt's recipes, each of the modules that it tied together."""
    return {name: round(recipe["bits"]) for recipe in raw for name in recipe["modules"]}


def of_nncf(raw: Mapping[str, str], linears: Sequence[str], widths: Sequence[int], **_: Any) -> Widths:
    """Classes of NNCF's decompressors of weights, by a name such as
    ``post_hooks.model:layers:0:mlp:up_proj:weight__0.0``: its 4 bits are the narrowest of ``widths``, its 8 bits the
    widest. Those of other modules are left out."""
    by_hook = {name.replace(".", ":"): name for name in linears}
    found: Widths = {}
    for hook, kind in raw.items():
        inside = hook.split("post_hooks.")[-1].removesuffix("__0.0").removesuffix(":weight")
        if inside in by_hook:
            if not kind.startswith(("INT4", "INT8")):
                raise ImpqError(f"NNCF gave {by_hook[inside]} a decompressor {kind}, which is neither INT4 nor INT8")
            found[by_hook[inside]] = widths[0] if kind.startswith("INT4") else widths[-1]
    return found


def of_threshold(raw: Mapping[str, float], sizes: Mapping[str, int], widths: Sequence[int], budget: float,
                 **_: Any) -> Widths:
    """mlx-lm's rule: the linears with scores above a threshold get the widest width, the others the narrowest; the
    threshold is the smallest that keeps the mean bits a weight within the budget.

    Args:
        raw: score of each linear.
        sizes: number of weights of each linear.
        widths: bits, ascending.
        budget: bits of codes a weight.
    """
    low, high = widths[0], widths[-1]
    spare = (budget - low) * sum(sizes[name] for name in raw)
    found = dict.fromkeys(raw, low)
    for score in sorted(set(raw.values()), reverse=True):
        level = [name for name, other in raw.items() if other == score]
        spare -= (high - low) * sum(sizes[name] for name in level)
        if spare < 0:
            break
        found.update(dict.fromkeys(level, high))
    return found


def checked(found: Widths, linears: Sequence[str], widths: Sequence[int], peer: str) -> Widths:
    """The widths of a peer, in the order of the linears.

    Raises:
        ImpqError: a linear has none, or one that is not on the menu, or there is one of something else.
    """
    missing = [name for name in linears if name not in found]
    if missing:
        raise ImpqError(f"{peer} gave no width for {missing[0]} and {len(missing) - 1} other linears")
    for name, bits in found.items():
        if name not in set(linears):
            raise ImpqError(f"{peer} gave a width for {name}, which is no linear of the plan")
        if bits not in widths:
            raise ImpqError(f"{peer} gave {name} {bits} bits; the menu is {', '.join(map(str, widths))}")
    return {name: found[name] for name in linears}
