"""The configuration of a run: impq.toml, and the command line's values over it, as one frozen ``RunConfig``."""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from impq_core.errors import UsageError, nearest
from impq_core.mixture import NamedText, parse_texts, require_all, require_held_out
from impq_core.trust import without_permissions

DTYPES = ("auto", "float32", "bfloat16", "float16")
SEQUENTIAL = FALLBACK = ("auto", "yes", "no")
GRANULARITIES = ("auto", "block", "group", "expert", "linear")
VALUES = ("nll", "kl")
SCORED = ("all", "assistant")
PREFIXES = ("widest", "unquantized")

WORKERS = re.compile(r"auto|[0-9]{1,4}|([a-z][a-z0-9_-]*)://(\S+)")
"""The values of ``workers``: a number, ``auto``, or an address, whose scheme is the name of a crew."""

METER = "meter."
"""Beginning of the names of the options of meters: those of meter ``table`` are in ``options."meter.table"``."""

WIDTHS = ("bits", "pins")
"""Keys whose values are names of choices, which may be written as numbers."""


def width_name(width: str | float) -> str:
    """The name of a choice: ``3`` for 3, 3.0 and "3.0"; any other text is a name."""
    try:
        return f"{float(width):g}"
    except ValueError:
        return str(width).strip()


def _normalize(config: TextConfig | RunConfig) -> None:
    """Convert paths to text, as configuration files hold them.

    Raises:
        UsageError: a text cannot be written to a UTF-8 file.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, Path):
            object.__setattr__(config, entry.name, str(value))
        for text in _texts(value):
            if "\0" in text or not _encodable(text):
                raise UsageError(f"{entry.name} holds a character that no UTF-8 file can hold: {text!r}")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (*_texts(key), *_texts(item))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _texts(item)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as Python writes an undecodable byte of a file name
        return False
    return True


@dataclass(frozen=True)
class TextConfig:
    """A text, or several, and the token windows drawn from them.

    Args:
        source: ``demo``, a .txt/.jsonl/.parquet file, or a ``datasets`` name ``path[:config[:split]]``; or several of
            these. Calibration texts are mixed: each has a share of the windows, 1 or as ``SOURCE=WEIGHT`` says.
            Held-out texts are scored one by one; ``NAME=SOURCE`` names the column of one.
        windows: number of windows: of a mixture, or of each held-out text.
        length: tokens in each window, with a beginning-of-sequence token if the model needs one.
        seed: seed of the draw.
        scored: tokens of chats that count in losses: ``all``, or those of the ``assistant``.
    """

    source: str | tuple[str, ...] = "demo"
    windows: int = 64
    length: int = 256
    seed: int = 0
    scored: str = "all"

    def __post_init__(self) -> None:
        sources = (self.source,) if isinstance(self.source, (str, Path)) else self.source
        object.__setattr__(self, "source", tuple(map(str, sources)) if len(sources) != 1 else str(sources[0]))
        _normalize(self)
        if not self.source or not all(self.source):
            raise UsageError("the name of a text is empty: give demo, a file, or a datasets name")
        _ = self.texts
        if self.scored not in SCORED:
            raise UsageError(f"unknown tokens to be scored '{self.scored}'{nearest(self.scored, SCORED)}")
        if self.seed < 0:
            raise UsageError(f"a seed must not be negative, as {self.seed} is")
        if self.windows < 1 or self.length < 2:
            raise UsageError(f"a text needs at least 1 window of 2 tokens, not {self.windows} of {self.length}")

    @property
    def texts(self) -> tuple[NamedText, ...]:
        """The texts, with names and weights."""
        return parse_texts((self.source,) if isinstance(self.source, str) else self.source)

    @property
    def shown(self) -> str:
        """The sources as the user wrote them."""
        return self.source if isinstance(self.source, str) else ", ".join(self.source)

    def with_sources(self, of: Callable[[str], str]) -> TextConfig:
        """The same texts with other sources, such as absolute paths."""
        return replace(self, source=tuple(text.at(of(text.source)) for text in self.texts))


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run: everything that decides its result, and the places of its files and its tracking.

    Args:
        model: ``demo``, a folder, or a hub name.
        backend, estimator, surrogate, allocator: names of parts, as ``impq plugins`` lists them.
        estimate_with: backend of the variants that the estimator measures, if it is not the deployed one; empty for
            ``backend``.
        refiner: name of the part that improves the plan by measuring plans near it.
        refine: limit of the refiner in full-model forwards; 0 for no refinement.
        fallback: ``yes`` to take the largest uniform model of the menu within the budget if the estimated plan does not
            beat it on calibration windows that are held back for that (``held_back``); ``auto`` is ``no`` in a sweep
            over parts, which compares plans as they are, and else ``yes``.
        bits: names of the choices of the menu, such as ``2``, ``3@128`` or ``Q4_K``; a number stands for its text.
            Empty for the backend's default menu.
        budget: such as ``3.0bits`` (nominal average), ``3.25bpw`` (stored), ``60MB`` or ``60%``; empty for the middle
            of the menu.
        whole: the budget bounds the file that an export writes: embeddings, head, norms, header and metadata included,
            in whichever installed format of the backend that file is largest. ``%`` is then a share of the unquantized
            file.
        meters: names of the parts that give layers a cost beside their bytes.
        limits: the most that a plan may take of a meter's cost, such as ``9ms``, by the cost's name. If none of
            ``meters`` has that cost, the one installed meter that has it is taken.
        granularity: ``block``, ``group`` (fused linears), ``expert`` or ``linear``; ``auto`` is ``block`` for an
            estimator that plays the game, because its cost grows with the number of layers, and ``group`` for any
            other.
        quantize_embeddings: make layers of the input embedding and the head too; a tied pair is one. Otherwise they are
            only if ``pins`` or ``plan`` name them.
        pins: name of a choice by pattern of layers that stay at it; their bytes count.
        exclude: patterns of layers that stay unquantized; their bytes count at 16 bits a weight.
        calibration: text for quantization statistics and the game, or a mixture of texts.
        game_windows: number of calibration windows of the game.
        probe_windows: number of calibration windows for gradients and activations, of those that are no referee's; 0
            for all that are not held back either.
        value: loss of the game: ``nll``, or ``kl`` to the unquantized model.
        evaluation: held-out text, or several; the first decides comparisons.
        sequential: ``yes`` if plan and references are quantized in sequence, as an export is, before they are scored;
            ``no`` if every width is quantized behind a prefix at the widest; ``auto`` for the first if it costs no more
            forwards than the search.
        device: where blocks compute: ``auto`` (an accelerator that torch can use, else the processor), ``cpu``, or the
            name of an accelerator in torch, such as ``cuda``, ``cuda:1``, ``mps`` or ``xpu``.
        dtype: type of the forwards; ``auto`` is bfloat16 if the device multiplies it fast, else float32 on the
            processor and float16 on an accelerator.
        memory: what the run may take where blocks compute, such as ``8GB``; empty for what is free. If the model does
            not fit, its blocks stay on disk until they work. No number depends on it.
        prefix: how the blocks in front of a block are quantized when its statistics are collected for the variants of a
            search: at their ``widest`` choice, or ``unquantized``.
        workers: processes that share the work: a number, ``auto`` (one for each accelerator, or for ``threads`` cores),
            or the address of a cluster such as ``ray://10.0.0.1:6379``; empty for none. No number depends on it.
        threads: threads of the processor for each process; 0 for those that torch takes, or for 1 if there are workers
            and no accelerator. Sums may differ in their last bits between numbers of threads.
        seed: seed of all random draws but those of the texts.
        plan: a plan file to apply instead of estimating and allocating.
        output: folder for run folders.
        tracking_uri: MLflow store; empty for ``MLFLOW_TRACKING_URI``, or for ``mlflow.db`` in the working folder if
            that is not set; ``none`` for no tracking.
        experiment: MLflow experiment; empty for ``MLFLOW_EXPERIMENT_NAME``, or for ``impq`` if that is not set.
        cache: read variants from the user's cache, and keep new ones there.
        partial: continue even if less than half of the weights in the model's blocks can be quantized, as in many
            mixtures of experts; the others stay at 16 bits.
        options: options of parts, by role.
    """

    model: str = "demo"
    backend: str = "gptq"
    estimate_with: str = ""
    estimator: str = "guided-output"
    surrogate: str = "auto"
    allocator: str = "qp"
    refiner: str = "swaps"
    refine: int = 0
    fallback: str = "auto"
    bits: tuple[str, ...] = ()
    budget: str = ""
    whole: bool = False
    meters: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    granularity: str = "auto"
    quantize_embeddings: bool = False
    pins: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    calibration: TextConfig = TextConfig()
    game_windows: int = 8
    probe_windows: int = 0
    value: str = "nll"
    evaluation: TextConfig = TextConfig()
    device: str = "auto"
    dtype: str = "auto"
    memory: str = ""
    prefix: str = "widest"
    workers: str = ""
    threads: int = 0
    seed: int = 0
    plan: str = ""
    output: str = "impq-runs"
    tracking_uri: str = ""
    experiment: str = ""
    cache: bool = True
    sequential: str = "auto"
    partial: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _normalize(self)
        for name in ("model", "output"):
            if not getattr(self, name):
                raise UsageError(f"{name} is empty: leave it out or give it a name")
        if self.seed < 0:
            raise UsageError(f"a seed must not be negative, as {self.seed} is")
        if not re.fullmatch("[a-z][a-z0-9_]*(:[0-9]{1,3})?", self.device):
            raise UsageError(f"device is a name such as auto, cpu, cuda, cuda:1, mps or xpu, not '{self.device}'")
        for name, allowed in (("dtype", DTYPES), ("granularity", GRANULARITIES), ("value", VALUES),
                              ("sequential", SEQUENTIAL), ("fallback", FALLBACK), ("prefix", PREFIXES)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"unknown {name} '{getattr(self, name)}'{nearest(getattr(self, name), allowed)}")
        if self.workers and not WORKERS.fullmatch(self.workers):
            raise UsageError("workers is a number, auto, or an address such as ray://10.0.0.1:6379, not "
                             f"'{self.workers}'")
        if not 0 <= self.threads <= 1024:
            raise UsageError(f"threads is a number from 1 on, or 0 for torch's own, not {self.threads}")
        if self.shared and not self.cache:
            raise UsageError("workers take the variants from the cache: leave out --no-cache or --workers")
        if not 1 <= self.game_windows <= self.calibration.windows:
            raise UsageError(f"game_windows must be 1 to the {self.calibration.windows} calibration windows, "
                             f"not {self.game_windows}")
        if self.refine < 0:
            raise UsageError(f"refine is a number of forwards, not {self.refine}")
        if self.refine and 2 * self.game_windows > self.calibration.windows:
            raise UsageError(f"--refine holds back {self.game_windows} further calibration windows, as many as "
                             f"game_windows: give at least {2 * self.game_windows} calibration windows, not "
                             f"{self.calibration.windows}")
        probed = self.calibration.windows - self.referee_windows
        if not 0 <= self.probe_windows <= probed:
            beside = f" that are not the {self.referee_windows} of --refine's referee" if self.refine else ""
            raise UsageError(f"probe_windows must be 1 to the {probed} calibration windows{beside}, or 0 for all, not "
                             f"{self.probe_windows}")
        if self.fallback == "yes" and not self.plan and not self.held_back:
            raise UsageError("--fallback tests the plan on a quarter of the calibration windows, and of "
                             f"{self.calibration.windows} none is left beside --game-windows {self.game_windows}"
                             + (f" and --probe-windows {self.probe_windows}" if self.probe_windows else "")
                             + ": give more --calibration-windows (4 at least), or leave out --fallback")
        require_all(self.calibration.texts, self.game_windows, "windows of the game (--game-windows)")
        require_held_out(self.evaluation.texts)
        object.__setattr__(self, "bits", tuple(map(width_name, self.bits)))
        object.__setattr__(self, "pins", {pattern: width_name(width) for pattern, width in self.pins.items()})
        if len(set(self.meters)) != len(self.meters):
            raise UsageError("meters names a meter twice")
        if len({name.lower() for name in self.bits}) != len(self.bits):
            raise UsageError("bits names a width twice")
        for name in (*self.bits, *self.pins.values()):
            if not name or re.fullmatch("-.*|0|inf|nan", name):
                raise UsageError(f"a width is a positive number of bits, or a name such as 3@128 or Q4_K, not '{name}'")

    @property
    def held_back(self) -> int:
        """Number of calibration windows that are no windows of the game, its further sets, a referee or gradients, so
        that the plan can be tested on them: a quarter, as far as these leave them. 0 if there is no fallback, or if the
        user gave the plan."""
        if self.fallback == "no" or self.plan:
            return 0
        read = max(self.game_windows, self.probe_windows) + self.referee_windows
        return max(0, min(self.calibration.windows // 4, self.calibration.windows - read))

    @property
    def referee_windows(self) -> int:
        """Number of calibration windows of a refinement's referee."""
        return self.game_windows if self.refine else 0

    @property
    def shared(self) -> bool:
        """Whether workers share the work."""
        return self.workers.strip("0") != ""

    def to_data(self) -> dict[str, Any]:
        """The configuration as plain data, as ``from_data`` reads it."""
        return tomllib.loads(self.to_toml())

    def to_toml(self) -> str:
        """The configuration as the text of an impq.toml."""
        return tomli_w.dumps(asdict(self))


def unmetered(config: RunConfig) -> RunConfig:
    """A configuration without meters and limits, for what makes no plan."""
    options = {slot: given for slot, given in config.options.items() if not slot.startswith(METER)}
    return replace(config, meters=(), limits={}, options=options)


def read_toml(path: Path) -> RunConfig:
    """Read an impq.toml.

    Raises:
        UsageError: the file is missing, is not TOML, or holds an unknown key or a value of the wrong type.
    """
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return from_data(data, str(path))


def from_data(data: Mapping[str, Any], where: str) -> RunConfig:
    """A configuration from plain data, as TOML or JSON holds it; raises UsageError, naming ``where``."""
    config: RunConfig = _build(RunConfig, without_permissions(data, where), where)
    return config


def override(config: RunConfig, **given: Any) -> RunConfig:
    """A configuration with the given values of the command line; None means not given. Values of a text have its role
    as a prefix: ``calibration_windows=8`` sets ``calibration.windows``."""
    given = {key: value for key, value in given.items() if value is not None}
    for role in ("calibration", "evaluation"):
        text = {f.name: given.pop(key) for f in fields(TextConfig)
                if (key := role if f.name == "source" else f"{role}_{f.name}") in given}
        if text:
            given[role] = replace(getattr(config, role), **text)
    return replace(config, **given)


def _build(kind: type[Any], data: Mapping[str, Any], where: str) -> Any:
    types = typing.get_type_hints(kind)
    values = {}
    for key, value in data.items():
        if key not in types:
            raise UsageError(f"{where}: unknown key '{key}'{nearest(key, types)}")
        values[key] = _value(types[key], value, key, where)
    try:
        return kind(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _value(expected: Any, value: Any, key: str, where: str) -> Any:
    if expected is TextConfig:
        if isinstance(value, dict):
            return _build(TextConfig, value, f"{where}, [{key}]")
        if isinstance(value, str):
            return TextConfig(source=value)
        if isinstance(value, list) and all(type(entry) is str and "\0" not in entry for entry in value):
            return TextConfig(source=tuple(value))
    elif expected == str | tuple[str, ...]:
        if isinstance(value, str) and "\0" not in value:
            return value
        if isinstance(value, list) and all(type(entry) is str and "\0" not in entry for entry in value):
            return tuple(value)
    elif expected in (str, int, bool):
        if type(value) is expected and "\0" not in str(value):  # no name of a file or part may contain it
            return value
    else:
        item = typing.get_args(expected)[-2 if typing.get_origin(expected) is tuple else -1]
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [None]
        fits = (dict,) if typing.get_origin(item) else (item, int, float) if key in WIDTHS else (item,)
        if isinstance(value, dict if typing.get_origin(expected) is Mapping else list) and all(
                type(entry) in fits for entry in items):
            return value if isinstance(value, dict) else tuple(value)
    shown = {"bits": "a list of widths", "exclude": "a list of patterns", "pins": "a table of widths",
             "meters": "a list of names", "limits": "a table of amounts such as '9ms'",
             "options": "a table for each role", "calibration": "a text name or table",
             "evaluation": "a text name or table", "source": "the name of a text, or a list of names"}
    kinds = {str: "text", int: "a whole number", bool: "true or false"}
    raise UsageError(f"{where}: '{key}' takes {kinds.get(expected) or shown[key]}, not {value!r}")
