"""Measurements, estimates and plans over a search space: numpy, checked on construction, written without pickle.

Losses are nats per token above the all-reference model unless a name says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from impq_core.costs import Cost, fits, limited
from impq_core.displayed import Displayed
from impq_core.errors import ImpqError, InvalidArrays, nearest
from impq_core.files import write_npz, write_text
from impq_core.space import Choice, FloatArray, IntArray, SearchSpace, frozen

_ROWS = ("path", "step", "replicate", "windows")
"""The columns of Measurements that say where a loss belongs."""

TOLERANCE = 1e-6
"""Rounding that an estimate's zeros and symmetry may be off by, relative to its largest term."""


@dataclass(frozen=True, eq=False)
class Measurements:
    """Every loss an estimator measured, kept so that any surrogate can be fitted later without the model.

    Losses on different sets of windows differ by their texts, not only by their picks: compare them within a set, or
    average over sets.

    Args:
        space: the space the picks belong to.
        picks: int64 (N, n).
        losses: float64 (N,), nats per token above the reference on the same windows.
        path: int64 (N,), the permutation a measurement belongs to; a path is measured on one set of windows.
        step: int64 (N,), its place in the permutation; step 0 is the path's start.
        replicate: int64 (N,), the independent draw: paths of one replicate (antithetic pairs) depend on each other.
        tokens: scored tokens behind each loss.
        reference_loss: absolute loss of the all-reference model on set 0, nats per token.
        forwards: cost of the measurements in full-model forwards.
        budget_bytes: size of the plans wanted, in bytes of ``space``: a surrogate that has to choose weighs losses near
            it most. None if there is no such size.
        windows: int64 (N,), number of the set of calibration windows that each loss was measured on. None is set 0 for
            all; files written before sets were recorded are read so.

    Raises:
        InvalidArrays: the arrays disagree in length, a pick lies outside the space, or a path spans two sets of
            windows.
    """

    space: SearchSpace
    picks: IntArray
    losses: FloatArray
    path: IntArray
    step: IntArray
    replicate: IntArray
    tokens: int
    reference_loss: float
    forwards: float
    budget_bytes: int | None = None
    windows: IntArray = None  # type: ignore[assignment]  # __post_init__ makes it zeros

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", frozen(np.asarray(self.losses, dtype=np.float64)))
        count = len(self.losses)
        if self.windows is None:
            object.__setattr__(self, "windows", np.zeros(count, dtype=np.int64))
        for name in ("picks", *_ROWS):
            object.__setattr__(self, name, frozen(np.asarray(getattr(self, name), dtype=np.int64)))
        if self.picks.shape != (count, len(self.space)):
            raise InvalidArrays(f"{count} losses need picks of shape ({count}, {len(self.space)}), not "
                                f"{self.picks.shape}")
        if count and not 0 <= self.picks.min() <= self.picks.max() < len(self.space.choices):
            raise InvalidArrays(f"picks for this space are numbers in 0..{len(self.space.choices) - 1}")
        for name in _ROWS:
            if getattr(self, name).shape != (count,):
                raise InvalidArrays(f"{name} must have the shape of the losses, ({count},), not "
                                f"{getattr(self, name).shape}")
        paths_and_sets = np.unique(np.stack([self.path, self.windows]), axis=1)
        if paths_and_sets.shape[1] > len(np.unique(self.path)):
            raise InvalidArrays("a path must be measured on one set of windows")

    def __len__(self) -> int:
        return len(self.losses)

    def require_finite(self) -> None:
        """Raises ImpqError that names the first measurement whose loss is NaN or infinite."""
        bad = np.flatnonzero(~np.isfinite(self.losses))
        if len(bad):
            first = bad[0]
            raise ImpqError(f"{len(bad)} of {len(self)} measured losses are not finite (first: permutation "
                            f"{self.path[first]}, step {self.step[first]}): the model overflows at these widths; "
                            "try --dtype float32 or wider --bits")

    def marginals(self) -> tuple[FloatArray, IntArray]:
        """Marginal cost of each demotion step, and the replicate of each path.

        Returns:
            (M, n, m-1) nats per token: ``[p, i, k]`` is the loss after minus before layer i went from choice k to
            k+1 in path p (NaN where the path never did); and (M,) replicates.
        """
        self.require_finite()
        paths = np.unique(self.path)
        table = np.full((len(paths), len(self.space), len(self.space.choices) - 1), np.nan)
        replicates = np.empty(len(paths), dtype=np.int64)
        for row, path in enumerate(paths):
            where = np.flatnonzero(self.path == path)
            where = where[np.argsort(self.step[where])]
            replicates[row] = self.replicate[where[0]]
            for before, after in pairwise(where):
                moved = np.flatnonzero(self.picks[before] != self.picks[after])
                if len(moved) != 1 or self.picks[after, moved[0]] != self.picks[before, moved[0]] + 1:
                    raise ImpqError(f"step {self.step[after]} of permutation {path} is not a single demotion")
                table[row, moved[0], self.picks[before, moved[0]]] = self.losses[after] - self.losses[before]
        return table, replicates

    def convergence(self) -> FloatArray:
        """Mean standard error of the Shapley values, nats per token, after 2, 3, ... replicates; empty if a permutation
        was not played to its end."""
        marginals, replicates = self.marginals()
        draws = np.stack([marginals[replicates == r].mean(axis=0) for r in np.unique(replicates)])
        if np.isnan(draws).any():
            return np.zeros(0)
        count = np.arange(1, len(draws) + 1)[:, None, None]
        mean, square = draws.cumsum(axis=0) / count, (draws**2).cumsum(axis=0) / count
        stderr: FloatArray = np.sqrt(np.maximum(square - mean**2, 0) / np.maximum(count - 1, 1)).mean(axis=(1, 2))
        return stderr[1:]

    def part(self, rows: IntArray) -> Measurements:
        """The measurements with the given row numbers."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ("picks", "losses", *_ROWS)})

    def save(self, path: Path) -> None:
        """Write an .npz file without pickle."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "space"}
        write_npz(path, {"space": json.dumps(self.space.to_dict()),
                         **{name: array for name, array in arrays.items() if array is not None}})

    @classmethod
    def load(cls, path: Path) -> Measurements:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as data:
            return cls(SearchSpace.from_dict(json.loads(str(data["space"]))), data["picks"], data["losses"],
                       data["path"], data["step"], data["replicate"], int(data["tokens"]),
                       float(data["reference_loss"]), float(data["forwards"]),
                       int(data["budget_bytes"]) if "budget_bytes" in data else None, data.get("windows"))


@dataclass(frozen=True, eq=False)
class SensitivityEstimate(Displayed):
    """The predicted cost of every choice, alone and in pairs: the input of an allocator.

    ``score(q) = sum_i linear[i, q_i] + sum_{i<j} pairwise[i, q_i, j, q_j]``. The score is the predicted loss in nats
    per token, or, with a link, a monotone function of it: the pick of least score is the pick of least loss.

    Args:
        space: the space it is an estimate of.
        linear: float64 (n, m); column 0 is 0.
        pairwise: float64 (n, m, n, m), symmetric, 0 within a layer and at choice 0; None for an additive estimate.
        stderr: float64 (n, m), standard error of ``linear``'s measured part; None if unknown.
        link: float64 (2, K), increasing scores and the losses they stand for, starting at 0 and 0; None if a score is a
            loss.
        method: how it was made, such as ``spqe + covariance``.
        forwards: what it cost, in full-model forwards.
        is_loss: whether ``predict`` gives losses in nats per token; false if scores only rank picks and have no unit.

    Zeros and symmetry may be off by rounding, up to ``TOLERANCE`` of the largest term; they are made exact.

    Raises:
        InvalidArrays: a shape is wrong, a term is not finite, the first column or choice is not 0, the pair terms are
            not symmetric or not 0 within a layer, or the link does not increase.
    """

    space: SearchSpace
    linear: FloatArray
    pairwise: FloatArray | None = None
    stderr: FloatArray | None = None
    method: str = ""
    forwards: float = 0.0
    link: FloatArray | None = None
    is_loss: bool = True

    def __post_init__(self) -> None:
        n, m = self.space.nbytes.shape
        if self.link is not None:
            object.__setattr__(self, "link", frozen(np.asarray(self.link, dtype=np.float64)))
            if (self.link.ndim != 2 or len(self.link) != 2 or not np.isfinite(self.link).all()
                    or (np.diff(self.link) <= 0).any() or self.link[:, 0].any()):
                raise InvalidArrays("an estimate's link is two increasing rows that begin with 0")
        terms: dict[str, FloatArray] = {}
        for name, shape in (("linear", (n, m)), ("stderr", (n, m)), ("pairwise", (n, m, n, m))):
            value = getattr(self, name)
            if value is None:
                continue
            terms[name] = np.array(value, dtype=np.float64)
            if terms[name].shape != shape:
                raise InvalidArrays(f"{name} of an estimate of this space has shape {shape}, not {terms[name].shape}")
            bad = np.argwhere(~np.isfinite(terms[name]))
            if name != "stderr" and len(bad):
                raise InvalidArrays(f"the estimate's {name} term of {self.space.layers[bad[0, 0]].name} is not finite")
        rounding = TOLERANCE * max(float(np.abs(terms[name]).max()) for name in ("linear", "pairwise") if name in terms)
        linear = terms["linear"]
        if np.abs(linear[:, 0]).max() > rounding:
            raise InvalidArrays("an estimate's first column is the reference and must be 0")
        linear[:, 0] = 0.0
        if "pairwise" in terms:
            pairs, own = terms["pairwise"], np.arange(n)
            if np.abs(pairs - pairs.transpose(2, 3, 0, 1)).max() > rounding:
                raise InvalidArrays("an estimate's pairwise terms must be symmetric")
            if np.abs(pairs[own, :, own]).max() > rounding:
                raise InvalidArrays("an estimate's pairwise terms within one layer must be 0: they belong to linear")
            if np.abs(pairs[:, 0]).max() > rounding:
                raise InvalidArrays("an estimate's pairwise terms at choice 0 must be 0: it is the reference")
            pairs = (pairs + pairs.transpose(2, 3, 0, 1)) / 2
            pairs[own, :, own] = pairs[:, 0] = pairs[:, :, :, 0] = 0.0
            terms["pairwise"] = pairs
        for name, value in terms.items():
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    def on(self, space: SearchSpace) -> SensitivityEstimate:
        """The same estimate for a space of the same layers and widths but other sizes, such as another backend's.

        Raises:
            ImpqError: layers or widths differ.
        """
        if space.layers != self.space.layers or [c.name for c in space.choices] != [c.name for c in self.space.choices]:
            raise ImpqError("an estimate can only be carried over to the same layers and widths")
        return replace(self, space=space)

    def predict(self, picks: IntArray) -> FloatArray:
        """Predicted losses (N,) of picks (N, n), nats per token above the reference."""
        return self.losses_of(self.score(picks))

    def losses_of(self, scores: FloatArray) -> FloatArray:
        """The losses that scores stand for; beyond the link's ends its first and last slopes continue."""
        if self.link is None:
            return scores
        x, y = self.link
        slopes = np.diff(y)[[0, -1]] / np.diff(x)[[0, -1]]
        inside: FloatArray = np.interp(scores, x, y)
        beyond: FloatArray = slopes[0] * np.minimum(scores, 0.0) + slopes[1] * np.maximum(scores - x[-1], 0.0)
        return inside + beyond

    def score(self, picks: IntArray) -> FloatArray:
        """Scores (N,) of picks (N, n), which an allocator minimises."""
        picks = np.atleast_2d(picks)
        index = np.arange(len(self.space))
        losses: FloatArray = self.linear[index, picks].sum(axis=1)
        if self.pairwise is not None:
            onehot = np.eye(len(self.space.choices))[picks].reshape(len(picks), -1)
            flat = self.pairwise.reshape(onehot.shape[1], -1)
            losses = losses + 0.5 * np.einsum("na,ab,nb->n", onehot, flat, onehot)
        return losses

    def save(self, path: Path) -> None:
        """Write an .npz file without pickle."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "space"}
        write_npz(path, {"space": json.dumps(self.space.to_dict()),
                         **{name: array for name, array in arrays.items() if array is not None}})

    @classmethod
    def load(cls, path: Path) -> SensitivityEstimate:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as data:
            is_loss = data.get("is_loss", data.get("nats", True))  # files of 0.1 call it nats, or lack it
            return cls(SearchSpace.from_dict(json.loads(str(data["space"]))), data["linear"],
                       data.get("pairwise"), data.get("stderr"),
                       str(data["method"]), float(data["forwards"]), data.get("link"), bool(is_loss))


@dataclass(frozen=True, eq=False)
class Plan(Displayed):
    """A width for every layer, and how sure the program is of it.

    Args:
        space: the space the pick belongs to.
        pick: int64 (n,).
        budget_bytes: what it had to fit in.
        predicted_loss: the estimate's prediction (its objective), nats per token above the reference.
        bound: proven lower bound of that prediction over all picks in the budget; None if nothing was proven.
        method: name of the allocator or refiner that made it, such as ``qp``.
        provenance: names and digests of its run, model, text and versions.
        is_loss: whether the prediction is a loss; false if it is the score of an estimate that only ranks.
        file_bytes: the most bytes of the file that an export of it writes, in any format; None if that is unknown.
        costs: further costs of the space's layers at its choices, some of them with limits.
    """

    FORMAT: ClassVar[str] = "impq-plan/1"

    space: SearchSpace
    pick: IntArray
    budget_bytes: int
    predicted_loss: float | None = None
    bound: float | None = None
    method: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    is_loss: bool = True
    file_bytes: int | None = None
    costs: tuple[Cost, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pick", frozen(self.space.check_pick(self.pick)))
        if self.nbytes > self.budget_bytes:
            raise InvalidArrays(f"the plan takes {self.nbytes} bytes, more than its budget of {self.budget_bytes}")
        for cost in limited(self.costs):
            if not cost.keeps(self.pick[None])[0]:
                raise InvalidArrays(f"the plan exceeds a limit: {cost.describe(self.pick)}")

    def admits(self, pick: IntArray) -> bool:
        """Whether another pick is within the plan's budget and limits."""
        return fits(self.space, pick, self.budget_bytes, limited(self.costs))

    @property
    def nbytes(self) -> int:
        """Stored bytes of the pick."""
        return self.space.bytes_of(self.pick)

    @property
    def gap(self) -> float | None:
        """Predicted loss minus its proven bound, nats per token; 0 is optimal."""
        if self.bound is None or self.predicted_loss is None:
            return None
        return max(0.0, self.predicted_loss - self.bound)

    def widths(self) -> dict[str, Choice | None]:
        """The choice of every linear by its module name; None for those that stay unquantized."""
        choices = zip(self.space.everyone, self.space.assignment(self.pick), strict=True)
        return {spec.name: choice for layer, choice in choices for spec in layer.linears}

    def save(self, path: Path) -> None:
        """Write plan.json: a map from layer name to width and group size, to read, edit and apply again."""
        choices = zip(self.space.everyone, self.space.assignment(self.pick), strict=True)
        layers = {layer.name: choice.to_plan() if choice else None for layer, choice in choices}
        promise: dict[str, Any] = {} if self.file_bytes is None else {"file_bytes": self.file_bytes}
        if self.costs:
            promise["costs"] = {cost.name: cost.to_plan(self.pick) for cost in self.costs}
        write_text(path, json.dumps({
            "format": self.FORMAT, "bytes": self.nbytes, "budget_bytes": self.budget_bytes, **promise,
            "bits_nominal": round(self.space.nominal_bits(self.nbytes), 4),
            "bits_stored": round(self.space.bits_per_weight(self.nbytes), 4),
            "predicted_loss": self.predicted_loss, "bound": self.bound, "is_loss": self.is_loss, "method": self.method,
            "provenance": dict(self.provenance), "layers": layers}, indent=1) + "\n")

    @classmethod
    def read_layers(cls, path: Path) -> dict[str, Choice | None]:
        """The choice of each layer in a plan file, by its name; None for one that stays unquantized.

        Raises:
            ImpqError: the file is missing, or is no plan.
        """
        try:
            data = json.loads(Path(path).read_text())
            form = data.get("format", cls.FORMAT)
            stored = {name: Choice.of(c) if c else None for name, c in data["layers"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise ImpqError(f"cannot read a plan from {path}: {reason}") from error
        if form != cls.FORMAT:
            raise ImpqError(f"plan {path} is of format {form}; this impq reads {cls.FORMAT}")
        return stored

    @classmethod
    def load(cls, path: Path, space: SearchSpace) -> Plan:
        """Read a plan for a space.

        Raises:
            ImpqError: the file is missing, is no plan, names a layer or a width the space lacks, or leaves one out.
        """
        stored = cls.read_layers(path)
        names = [layer.name for layer in space.everyone]
        for name in stored:
            if name not in names:
                raise ImpqError(f"plan {path} names layer '{name}', which the model lacks at this granularity"
                                + nearest(name, names)[:120])
        for name in names:
            if name not in stored:
                raise ImpqError(f"plan {path} gives no width for layer '{name}'")
        for pin in space.pinned:
            found = stored[pin.layer.name]
            if found != pin.choice and not (found and pin.choice and found.replaces(pin.choice)):
                raise ImpqError(f"plan {path} gives '{pin.layer.name}' another width than its pin")
        pick = []
        for layer in space.layers:
            choice = stored[layer.name]
            matches = [k for k, offered in enumerate(space.choices) if choice and choice.replaces(offered)]
            if not matches:
                menu = ", ".join(map(_described, space.choices))
                given = _described(choice) if choice else "no width"
                raise ImpqError(f"plan {path} gives '{layer.name}' {given}; the widths asked for are {menu}")
            pick.append(matches[0])
        picked = np.array(pick, dtype=np.int64)
        return cls(space, picked, space.bytes_of(picked), method=f"plan file {Path(path).name}")

    @classmethod
    def restore(cls, path: Path, space: SearchSpace) -> Plan:
        """Read a plan as it was saved, with its budget, prediction and provenance, which ``load`` leaves out: a file
        that was edited has others.

        Raises:
            ImpqError: as ``load``, or a number is missing.
        """
        plan = cls.load(path, space)
        try:
            data = json.loads(Path(path).read_text())
            return replace(plan, budget_bytes=int(data["budget_bytes"]), predicted_loss=data["predicted_loss"],
                           bound=data["bound"], method=str(data["method"]), provenance=data["provenance"],
                           is_loss=bool(data.get("is_loss", True)), file_bytes=data.get("file_bytes"))
        except (KeyError, TypeError, ValueError) as error:
            raise ImpqError(f"plan {path} is not what a run writes: {type(error).__name__}: {error}") from error


def _described(choice: Choice) -> str:
    """All that a plan file says of a choice."""
    form = f"{choice.bits:g} bits in groups of {choice.group_size}"
    return form if choice.is_width else f"{choice} ({form})"
