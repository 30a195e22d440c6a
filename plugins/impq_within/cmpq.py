"""The CMPQ backend: channel-wise mixed precision with codebooks (arXiv 2410.13056)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from impq_core.errors import ImpqError
from impq_core.interfaces import Statistics, Variant
from impq_core.space import Choice, LinearSpec
from impq_within.base import Mixture, MixtureOptions

if TYPE_CHECKING:
    import torch

WIDEST = 8
"""Bits of the widest codes."""

CHUNK = 128
"""Columns whose centroids are fitted together, in front of the first one's rounding."""


@dataclass(frozen=True)
class Options(MixtureOptions):
    """Options of the CMPQ backend.

    Args:
        exchange: share of the channels of largest norm that get a bit more at a whole width, and of the smallest that
            get a bit less; 0 leaves all at one width.
        codebook: what a codebook serves: ``column``, a channel, as in the paper, or ``row``, the weights of a row that
            have one width, as in SqueezeLLM.
        overhead: most bits a weight that centroids may take; neighbouring columns, in the order of their norms, or
            neighbouring rows share a codebook as far as this needs. 16 lets none share.
        outliers_by_activation: share of the weights, those of largest magnitude times channel norm, that stay at 16
            bits; the paper's is 0.0005.
        outliers_by_error: share of the weights, those of largest quantization error, that stay at 16 bits; the
            paper's is 0.0045.
        weigh_errors: rank quantization errors times the channel norm; the paper does not.
        feedback: spread each column's rounding error over the columns behind it, as GPTQ does; the paper does not.
    """

    exchange: float = 0.1
    codebook: str = "column"
    overhead: float = 0.03
    outliers_by_activation: float = 0.0
    outliers_by_error: float = 0.002
    weigh_errors: bool = False
    feedback: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook not in ("column", "row"):
            raise ValueError(f"codebook must be column or row, not {self.codebook}")
        if not 0 <= self.exchange <= 0.5:
            raise ValueError(f"exchange must lie between 0 and 0.5, not {self.exchange}")
        if self.overhead <= 0:
            raise ValueError(f"overhead must be positive, not {self.overhead}")
        for name in ("outliers_by_activation", "outliers_by_error"):
            if not 0 <= getattr(self, name) <= 0.1:
                raise ValueError(f"{name} must lie between 0 and 0.1, not {getattr(self, name)}")


@dataclass(frozen=True)
class _Layout:
    """What is stored for a linear, from its shape alone.

    Args:
        parts: bits and number of columns of each part, in descending order of the columns' norms.
        by_row: whether a codebook serves weights of a row, else of a column.
        share: rows or columns that share a codebook.
        outliers: number of weights at 16 bits, by activation and by error.
    """

    parts: tuple[tuple[int, int], ...]
    by_row: bool
    share: int
    outliers: tuple[int, int]

    def books(self, rows: int, columns: int) -> int:
        """Number of codebooks of a part with this many columns."""
        return -(-(rows if self.by_row else columns) // self.share)


class Cmpq(Mixture):
    """CMPQ (arXiv 2410.13056): channels at two neighbouring widths, a codebook for each, and two kinds of outliers.

    Channels, the columns c of a weight, are ranked by the L2 norm of their inputs, ``s_c = sqrt(sum_t x_tc^2)``. At a
    width t between k and k + 1 bits, the round((t - k) columns) channels of largest norm have k + 1 bits and the others
    k; at a whole width k, a share ``exchange`` of the channels has k + 1 bits and as many have k - 1. Any width between
    1 and 8 bits is a choice.

    Codes point to 2^b centroids, which 1-D k-means finds. What is stored beside the codes: the order of the channels,
    the centroids in 16 bits, and the outliers with their rows. A codebook for every column takes 16 2^b / rows bits a
    weight: 0.03 at 3 bits and 4096 rows, but 0.67 with 192 rows. Option ``overhead`` bounds that: neighbouring columns,
    in the order of their norms, share a codebook.

    1. ``outliers_by_activation``: the weights of largest |w_rc| s_c stay at 16 bits and are left out of the fit.
    2. k-means of the others; errors are weighted by s_c^2 if columns share a codebook.
    3. ``outliers_by_error``: the weights of largest |w - Q(w)| s_c stay at 16 bits too, and centroids are fitted once
       more without them.
    4. With ``feedback``, columns are rounded in the order of their norms, and each one's error is spread over those
       behind it as in GPTQ, with centroids fitted to the corrected weights. Channels and outliers are chosen before:
       what GPTQ leaves as an error is the correction of another one.

    The number of outliers and the widths of channels depend on the linear's shape only, and so do the bytes.
    """

    Options = Options
    default_bits = ("2", "2.25", "2.5", "3", "4")

    def choices(self) -> tuple[Choice, ...]:
        """4, 3.5, 3, 2.5, 2.25 and 2 bits, of the many that there are."""
        return tuple(Choice(bits, 0) for bits in (4.0, 3.5, 3.0, 2.5, 2.25, 2.0))

    def choice(self, name: str) -> Choice | None:
        """An average width from 1 to 8 bits by its number, with up to three decimals."""
        if not re.fullmatch(r"[1-8](\.[0-9]{1,3})?", name) or not 1 <= float(name) <= WIDEST:
            return None
        return Choice(float(name), 0)

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Every shape can be stored."""

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of the codes, filled up to eight at each width; of 16-bit centroids; of the order of the columns, in 16
        bits if these can count them, else 32; and, if there are outliers, of their 16-bit values, and of their rows and
        their number in each column, in 16 or 32 bits."""
        from impq_within.codes import bytes_of

        layout = self._layout(linear, choice)
        total = linear.columns * _index_bytes(linear.columns)
        for bits, columns in layout.parts:
            total += bytes_of(columns * linear.rows, bits) + 2 * 2**bits * layout.books(linear.rows, columns)
        if count := sum(layout.outliers):
            total += 2 * count + _index_bytes(linear.rows + 1) * (count + linear.columns)
        return total

    def _layout(self, linear: LinearSpec, choice: Choice) -> _Layout:
        rows, columns = linear.rows, linear.columns
        parts = _parts(choice.bits, columns, self.options.exchange)
        outliers = (round(self.options.outliers_by_activation * linear.parameters),
                    round(self.options.outliers_by_error * linear.parameters))

        by_row = self.options.codebook == "row"
        most, lines = self.options.overhead * linear.parameters / 16, rows if by_row else columns

        def fits(share: int) -> bool:
            layout = _Layout(parts, by_row, share, outliers)
            return sum(2**bits * layout.books(rows, count) for bits, count in parts) <= most

        return _Layout(parts, by_row, next(filter(fits, range(1, lines)), lines), outliers)

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """Channels by the diagonal of the given statistics, and feedback by all of it.

        If no calibration token reached the linear, all channels have the same norm, and the record has ``unreached``.

        Raises:
            ImpqError: statistics are missing or not finite, or the weights overflow 16 bits.
        """
        import torch

        from impq_within.codes import pack
        from impq_within.feedback import corrected, hessian, reached, required

        spec = LinearSpec("", *weight.shape)
        layout = self._layout(spec, choice)
        statistics = required(statistics, "cmpq")
        seen = reached(statistics)
        norms = statistics.gram.diagonal().float().sqrt() if seen else weight.new_ones(spec.columns).float()
        order = norms.argsort(descending=True, stable=True)
        weight, norms = corrected(weight, statistics, self.options.drift_strength)[:, order], norms[order]
        damped = hessian(statistics, self.options.damping)[order][:, order] if seen and self.options.feedback else None
        kept, values, codes, books = self._fitted(weight, norms, layout, damped)
        tensors = {"order": _index(order, spec.columns)}
        for (bits, _), code, book in zip(layout.parts, codes, books, strict=True):
            tensors[f"codes_{bits}"] = pack(code if layout.by_row else code.T, bits)
            tensors[f"centroids_{bits}"] = book
        if sum(layout.outliers):
            columns, rows = kept.T.nonzero(as_tuple=True)
            tensors["outlier_values"] = values[rows, columns].half()
            tensors["outlier_rows"] = _index(rows, spec.rows + 1)
            tensors["outlier_counts"] = _index(kept.sum(0), spec.rows + 1)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ImpqError(f"the weights overflow 16 bits at {choice} bits")
        return Variant(choice, tensors, {} if seen else {"unreached": 1.0})

    def _fitted(self, weight: torch.Tensor, norms: torch.Tensor, layout: _Layout, damped: torch.Tensor | None) -> tuple[
            torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Fit and round a weight (rows, columns) whose columns have descending norms (columns,).

        Args:
            damped: the Hessian in the same order; None for no feedback.

        Returns:
            Which weights are outliers, bool (rows, columns), and the weight with their values; the codes of each part,
            uint8 (rows, its columns); and its centroids, float16 (codebooks, 2^bits).
        """
        import torch

        from impq_within.feedback import inverse_factor, spread

        free = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        _take(free, weight.abs() * norms, layout.outliers[0])
        if layout.outliers[1]:
            books = [self._books(part, keep, scale, bits, layout) for part, keep, scale, bits in
                     _split(weight, free, norms, layout)]
            rounded = torch.cat([_rounded(part, book, layout)[1] for (part, *_), book in
                                 zip(_split(weight, free, norms, layout), books, strict=True)], dim=1)
            errors = (weight - rounded).abs()
            _take(free, (errors * norms if self.options.weigh_errors else errors).masked_fill(~free, -1),
                  layout.outliers[1])
        if damped is None:
            books, codes = [], []
            for part, keep, scale, bits in _split(weight, free, norms, layout):
                books.append(self._books(part, keep, scale, bits, layout))
                codes.append(_rounded(part, books[-1], layout)[0])
            return ~free, weight, codes, books
        held = _Held()
        pieces = [(size, self._rounder(free[:, at:at + size], norms[at:at + size], bits, layout, held))
                  for at, size, bits in _pieces(layout)]
        values = spread(weight, inverse_factor(damped), pieces)
        return ~free, values, *held.parts(layout)

    def _books(self, weight: torch.Tensor, free: torch.Tensor, norms: torch.Tensor, bits: int,
               layout: _Layout) -> torch.Tensor:
        """Centroids (codebooks, 2^bits), in 16 bits, of columns of one width."""
        from impq_within.kmeans import centroids

        weights = free * norms.square()
        return centroids(_lines(weight, layout), _lines(weights, layout), 2**bits).half()

    def _rounder(self, free: torch.Tensor, norms: torch.Tensor, bits: int, layout: _Layout,
                 held: _Held) -> Callable[[torch.Tensor], Callable[[int, torch.Tensor], torch.Tensor]]:
        """The rounder of a piece for ``feedback.spread``; it leaves the piece's centroids and codes in ``held``."""
        import torch

        from impq_within.kmeans import nearest

        def begin(weight: torch.Tensor) -> Callable[[int, torch.Tensor], torch.Tensor]:
            books = self._books(weight, free, norms, bits, layout)
            held.add(bits, books, weight.shape)
            centres = books.float()
            if layout.by_row:
                centres = centres.repeat_interleave(layout.share, dim=0)[:len(weight)]

            def round_column(column: int, values: torch.Tensor) -> torch.Tensor:
                if layout.by_row:
                    code = nearest(values[:, None], centres)
                    rounded = centres.gather(1, code)[:, 0]
                else:
                    own = centres[column // layout.share]
                    code = nearest(values[None], own[None])[0]
                    rounded = own[code]
                held.codes[-1][:, column] = code.view(-1)
                return torch.where(free[:, column], rounded, values.half().float())

            return round_column

        return begin

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """The centroid of each code, and the 16-bit values of outliers."""
        import torch

        from impq_within.codes import unpack

        tensors, layout = variant.tensors, self._layout(linear, variant.choice)
        order = tensors["order"].long()
        weight = torch.empty(linear.rows, linear.columns, device=order.device)
        start = 0
        for bits, columns in layout.parts:
            books = tensors[f"centroids_{bits}"].float().repeat_interleave(layout.share, dim=0)
            shape = (linear.rows, columns) if layout.by_row else (columns, linear.rows)
            values = books[:shape[0]].gather(1, unpack(tensors[f"codes_{bits}"], bits, shape).long())
            weight[:, order[start:start + columns]] = values if layout.by_row else values.T
            start += columns
        if sum(layout.outliers):
            places = tensors["outlier_rows"].long(), order.repeat_interleave(tensors["outlier_counts"].long())
            weight[places] = tensors["outlier_values"].float()
        return weight


class _Held:
    """Codes and centroids of pieces of columns, until all are rounded."""

    def __init__(self) -> None:
        self.bits: list[int] = []
        self.books: list[torch.Tensor] = []
        self.codes: list[torch.Tensor] = []

    def add(self, bits: int, books: torch.Tensor, shape: tuple[int, ...]) -> None:
        """A piece that is about to be rounded."""
        import torch

        self.bits.append(bits)
        self.books.append(books)
        self.codes.append(torch.empty(shape, dtype=torch.uint8, device=books.device))

    def parts(self, layout: _Layout) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Codes and centroids of each part."""
        import torch

        def joined(pieces: list[torch.Tensor], bits: int, dim: int) -> torch.Tensor:
            return torch.cat([piece for piece, own in zip(pieces, self.bits, strict=True) if own == bits], dim=dim)

        return ([joined(self.codes, bits, 1) for bits, _ in layout.parts],
                [joined(self.books, bits, 0) for bits, _ in layout.parts])


def _parts(width: float, columns: int, exchange: float) -> tuple[tuple[int, int], ...]:
    """Bits and number of columns of each part, widest first; a part without columns is left out."""
    low = int(width)
    wide = round((width - low) * columns)
    counts = {low + 1: wide, low: columns - wide}
    if width == low and 1 < low < WIDEST:
        moved = round(exchange * columns)
        counts = {low + 1: moved, low: columns - 2 * moved, low - 1: moved}
    return tuple((bits, count) for bits, count in counts.items() if count)


def _pieces(layout: _Layout) -> list[tuple[int, int, int]]:
    """First column, number of columns and bits of what is fitted at a time: a part if codebooks serve rows, else about
    ``CHUNK`` columns with codebooks of their own."""
    pieces, start = [], 0
    for bits, count in layout.parts:
        most = count if layout.by_row else max(1, CHUNK // layout.share) * layout.share
        pieces += [(start + at, min(most, count - at), bits) for at in range(0, count, most)]
        start += count
    return pieces


def _split(weight: torch.Tensor, free: torch.Tensor, norms: torch.Tensor,
           layout: _Layout) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Weights, which of them are no outliers, norms and bits of each part."""
    sizes = [columns for _, columns in layout.parts]
    return list(zip(weight.split(sizes, 1), free.split(sizes, 1), norms.split(sizes),
                    [bits for bits, _ in layout.parts], strict=True))


def _lines(table: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """(rows, columns) as (codebooks, numbers); the last codebook's line is filled up with zeros."""
    import torch

    lines = table if layout.by_row else table.T
    return torch.nn.functional.pad(lines, (0, 0, 0, -len(lines) % layout.share)).reshape(
        -1, layout.share * lines.shape[1])


def _rounded(weight: torch.Tensor, books: torch.Tensor, layout: _Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8, and values (rows, columns) of the nearest centroids."""
    import torch

    from impq_within.kmeans import nearest

    lines, centres = _lines(weight, layout), books.float()
    codes = nearest(lines, centres)

    def table(found: torch.Tensor) -> torch.Tensor:
        if layout.by_row:
            return found.view(-1, weight.shape[1])[:len(weight)]
        return found.view(-1, len(weight))[:weight.shape[1]].T

    return table(codes).to(torch.uint8), table(centres.gather(1, codes))


def _take(free: torch.Tensor, scores: torch.Tensor, count: int) -> None:
    """Make the ``count`` weights of largest scores (rows, columns) outliers."""
    if count:
        free.view(-1)[scores.flatten().argsort(descending=True, stable=True)[:count]] = False


def _index(numbers: torch.Tensor, limit: int) -> torch.Tensor:
    """Whole numbers below a limit, in 16 bits if they fit, else in 32."""
    import torch

    return numbers.to(torch.int16 if _index_bytes(limit) == 2 else torch.int32)


def _index_bytes(limit: int) -> int:
    return 2 if limit <= 2**15 else 4
