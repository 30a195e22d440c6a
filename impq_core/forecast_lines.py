"""A forecast of what a run will take, in lines for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from impq_core.space import in_bits
from impq_core.units import shown

if TYPE_CHECKING:
    from impq_core.runs.forecast import Fixed, Forecast, SearchForecast


def forecast_lines(forecast: Forecast) -> list[str]:
    """A forecast in lines: the model; layers, fixed parts, sizes and forwards of each search; memory; disk."""
    config = forecast.config
    lines = [f"{config.model}: {forecast.architecture}, {forecast.blocks} blocks, {forecast.parameters / 1e6:.1f} M "
             f"parameters, {config.dtype} on {_device(forecast)}"]
    for search, before in zip(forecast.searches, (None, *forecast.searches), strict=False):
        lines += _search_lines(search, before)
    lines.append(f"a forward: {config.game_windows} windows of {config.calibration.length} tokens, "
                 f"{forecast.flops / 1e12:.3g} TFLOP")
    stage, peak = forecast.peak
    held = next(search.memory[stage] for search in forecast.searches if search.peak == (stage, peak))
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}"
                      for name, size in sorted(held.items(), key=lambda item: -item[1]))
    free = "" if forecast.free_memory is None else f"; {forecast.free_memory / 1e9:.1f} GB are free"
    streamed = "; blocks stay on disk until they work" if any(search.streamed for search in forecast.searches) else ""
    lines.append(f"memory: about {peak / 1e9:.1f} GB at the peak, in {stage} ({parts}){free}{streamed}")
    takes, room = forecast.disk, forecast.free_disk
    exports = f", exports {_size(takes['export_bytes'])}" if takes["export_bytes"] else ""
    lines.append(f"disk: about {_size(takes['cache_bytes'])} in the cache ({room['cache_bytes'] / 1e9:.1f} GB are "
                 f"free), {_size(takes['run_bytes'])}{exports} in {config.output} "
                 f"({room['run_bytes'] / 1e9:.1f} GB are free)")
    lines.append("no weight and no text was read; what is in the cache already is not taken off")
    return lines


def _device(forecast: Forecast) -> str:
    """The device of a forecast; of an accelerator with its hardware and free memory."""
    name = forecast.config.device
    if name == "cpu":
        return name
    free = "" if forecast.free_device is None else f", {forecast.free_device / 1e9:.1f} GB of its memory are free"
    return f"{name} ({forecast.hardware}{free})"


def _search_lines(search: SearchForecast, before: SearchForecast | None) -> list[str]:
    """A search in lines; its sizes are left out if they are those of the search before."""
    measured = f", measured with {search.estimate_with}" if search.estimate_with else ""
    lines = [f"{search.estimator} on {search.backend}{measured}: {search.layers} layers ({search.granularity}), "
             f"{search.weights / 1e6:.1f} M weights, {in_bits(*search.bits)}"]
    if before is None or (before.fixed, before.budgets) != (search.fixed, search.budgets):
        lines += _size_lines(search)
    counts = ", ".join(f"{stage} {'unknown' if count is None else f'{count:.1f}'}"
                       for stage, count in search.forwards.items() if count != 0)
    losses = f" ({search.losses:.0f} losses)" if search.losses else ""
    return [*lines, f"  forwards: {counts}{losses}"]


def _size_lines(search: SearchForecast) -> list[str]:
    """The parts at a fixed width with the reason, the budgets, and the reachable sizes."""
    lines = []
    kinds: dict[tuple[str, str], list[Fixed]] = {}
    for part in search.fixed:
        kinds.setdefault((part.bits, part.reason), []).append(part)
    for (bits, reason), parts in kinds.items():
        names = "; ".join(part.name for part in parts) if len(parts) < 3 else (
            f"{len(parts)} layers, the first {parts[0].name}")
        lines.append(f"  at {in_bits(bits)}: {names}, {_size(sum(part.bytes for part in parts))} ({reason})")
    low, high = search.smallest, search.largest
    for size in search.budgets:
        lines.append(f"  budget {size.budget}: {_size(size.bytes)}, {size.bits_nominal:.3f} bits nominal, "
                     f"{size.bits_stored:.3f} stored"
                     + (f"; a file of at most {_size(size.file_bytes)}" if size.file_bytes else ""))
    for cost in search.costs:
        limit = f", limit {shown(cost.limit, cost.unit)}" if cost.limit is not None else ""
        lines.append(f"  {cost.name} by meter {cost.meter}: {shown(cost.least, cost.unit)} to "
                     f"{shown(cost.most, cost.unit)} a token{limit}" + "".join(f"; {note}" for note in cost.notes))
    lines.append(f"  reachable: {_size(low.bytes)} to {_size(high.bytes)}, {low.bits_nominal:.3f} to "
                 f"{high.bits_nominal:.3f} bits nominal, {low.bits_stored:.3f} to {high.bits_stored:.3f} stored"
                 + (f"; files of {_size(low.file_bytes)} to {_size(high.file_bytes)}"
                    if low.file_bytes and high.file_bytes else ""))
    return lines


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
