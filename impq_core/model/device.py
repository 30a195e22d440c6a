"""Devices: the processor and accelerators, by the names that torch gives them.

A run has one device. Blocks compute there; everything that has become a number is a NumPy array on the host.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from impq_core.errors import ImpqError, UsageError, nearest
from impq_core.space import FloatArray

FAMILIAR = ("auto", "cpu", "cuda", "mps", "xpu")
"""Names that an unknown one is compared with, beside those of the devices that are there."""


def devices_there() -> list[torch.device]:
    """The processor, and every accelerator that torch can use here, with its index."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [torch.device("cpu"), *(_each(accelerator.type) if accelerator else ())]


def resolve_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: ``cpu``; the name of an accelerator in torch, alone (then the one that torch uses at the moment) or with
            an index; or ``auto``: the accelerator that torch uses at the moment, else the processor.

    Returns:
        The device; that of an accelerator has its index, as the devices of its tensors have.

    Raises:
        UsageError: torch knows no device of that name.
        ImpqError: this machine has no such device that torch can use.
    """
    # Read when the library is first used; without it torch refuses to promise repeatable products on CUDA devices.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    there = devices_there()
    if name == "auto":
        return _current(there[-1].type)
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        known = {*FAMILIAR, *(device.type for device in there)}
        raise UsageError(f"unknown device '{name}'{nearest(name, known)}") from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    found = _each(wanted.type)
    if wanted.index is None and found:
        return _current(wanted.type)
    if wanted not in found:
        names = ", ".join(map(str, dict.fromkeys([*there, *found])))
        raise ImpqError(f"device {name} is not there, or this build of torch cannot use it: --device takes {names} or "
                        "auto")
    return wanted


def _each(kind: str) -> list[torch.device]:
    """The devices of a type that torch can use."""
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:  # a type without a module of its own, such as meta
        return []
    count = module.device_count() if module.is_available() else 0
    return [torch.device(kind, index) for index in range(count)]


def _current(kind: str) -> torch.device:
    """The device of a type that torch uses if no index is given."""
    if kind == "cpu":
        return torch.device("cpu")
    current = getattr(torch.get_device_module(kind), "current_device", None)  # torch.mps has one device and no such
    return torch.device(kind, int(current()) if current else 0)


def hardware(device: torch.device) -> str:
    """The type of a device and, of an accelerator, the name of its hardware. Results of two devices with the same name
    may be compared bit for bit; the last bits of sums differ between hardware."""
    if device.type == "cpu":
        return "cpu"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    name = named(device) if named else torch.backends.mps.get_name() if device.type == "mps" else ""
    return f"{device.type} {name}".rstrip()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forwards.

    ``auto`` is bfloat16 on accelerators that multiply it, and float16 on others, such as CUDA devices before Ampere. On
    the processor it is bfloat16 if that is twice as fast as float32: on processors with AMX, and on AMD processors with
    AVX-512. On Intel's AVX-512 a bfloat16 linear takes 1.8 times as long (measured).

    Args:
        name: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: where the forwards run.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type != "cpu":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float16
    able = torch.cpu.get_capabilities()
    fast = able.get("amx_tile") or (able.get("avx512_bf16") and "AMD" in able.get("cpu_name", ""))
    return torch.bfloat16 if fast else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator multiplies bfloat16 itself; one that does not say is tried."""
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if supported:
        with torch.accelerator.device_index(device.index):
            return bool(supported(including_emulation=False))
    with contextlib.suppress(RuntimeError, TypeError):
        matrix = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return bool((matrix @ matrix)[0, 0].item() == 2.0)
    return False


@contextlib.contextmanager
def repeatable(device: torch.device, strict: bool = False) -> Iterator[None]:
    """The context in which operators on an accelerator return the same bits each time that they are called. Without it
    the backward pass of attention on CUDA devices adds in the order in which its threads end. Nothing changes on the
    processor, whose kernels are repeatable.

    Args:
        device: where operators compute.
        strict: raise a RuntimeError at an operator without a repeatable kernel; else torch warns of it once. Some
            kernels, such as those of attention in float32, are repeatable only if this is set.
    """
    if device.type == "cpu":
        yield
        return
    settings: Any = torch.utils.deterministic  # a module with a property, which type checkers do not know
    mode, fills = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error" if strict else "warn")
    settings.fill_uninitialized_memory = False  # no code here reads memory that it has not written
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fills


def on_host(tensor: torch.Tensor) -> FloatArray:
    """A tensor as a float64 array. The conversion is done on the host, because some devices have no float64."""
    values: FloatArray = tensor.detach().cpu().double().numpy()
    return values
