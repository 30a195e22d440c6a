"""The GPTQ backend: an adapter to the layer API of gptqmodel."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError
from impq_core.interfaces import Backend, Statistics, Variant
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    import torch


TENSORS = ("qweight", "qzeros", "scales", "g_idx")
"""Names of the tensors that gptqmodel stores for a linear."""


@dataclass(frozen=True)
class Options:
    """Options of the GPTQ backend.

    Args:
        group_size: weights of a row that share a scale and a zero.
        symmetric: fix zeros at the middle of the range, which some file formats need; asymmetric quantization is more
            accurate at 2 and 3 bits.
        group_aware: gptqmodel's group-aware order of columns, which has most of the gain of act-order and needs no
            stored order.
        clip_search: clip each group's range to minimise the squared weight error.
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
    """

    group_size: int = 64
    symmetric: bool = False
    group_aware: bool = True
    clip_search: bool = True
    damping: float = 0.05

    def __post_init__(self) -> None:
        if self.group_size not in (16, 32, 64, 128, 256, 512, 1024):
            raise ValueError(f"group_size must be 16, 32, 64, 128, 256, 512 or 1024, not {self.group_size}")
        if not 0 < self.damping < 1:
            raise ValueError(f"damping must lie between 0 and 1, not {self.damping}")


class Gptq(Backend):
    """GPTQ at 8, 4, 3 and 2 bits, packed as gptqmodel stores it (qweight, qzeros, scales, g_idx)."""

    Options = Options
    default_bits = (2.0, 3.0, 4.0)
    needs = frozenset({"activations"})

    def choices(self) -> tuple[Choice, ...]:
        """8, 4, 3, 2 bits."""
        return tuple(Choice(float(bits), self.options.group_size) for bits in (8, 4, 3, 2))

    def check(self, linear: LinearSpec, choice: Choice) -> None:
        """Raises ImpqError if groups do not divide the inputs, or inputs or outputs are no multiples of 32."""
        if linear.columns % choice.group_size:
            fits = [size for size in (128, 64, 32, 16) if linear.columns % size == 0]
            raise ImpqError(f"backend gptq: group size {choice.group_size} does not divide the {linear.columns} inputs "
                            f"of {linear.name}" + (f"; -o group_size={fits[0]} does" if fits else ""))
        if linear.columns % 32 or linear.rows % 32:
            raise ImpqError(f"backend gptq: {linear.name} is {linear.rows} x {linear.columns}; GPTQ packs multiples "
                            "of 32 only")

    def nbytes(self, linear: LinearSpec, choice: Choice) -> int:
        """Bytes of the codes, a 16-bit scale and a packed zero for each group of each row, and a 32-bit group index for
        each column."""
        groups = linear.columns // choice.group_size
        bits = int(choice.bits)
        codes = linear.columns * linear.rows * bits // 8
        return codes + groups * linear.rows * 2 + groups * linear.rows * bits // 8 + linear.columns * 4

    def quantize(self, weight: torch.Tensor, choice: Choice, statistics: Statistics | None) -> Variant:
        """GPTQ with the Hessian 2/N sum x xT of the given statistics.

        If no calibration token reached the linear, the Hessian is the identity, so that GPTQ is plain rounding, and the
        record has ``unreached``.

        Raises:
            ImpqError: there are no statistics, they are not finite, or the library gives up on the Hessian.
        """
        import torch

        if statistics is None:
            raise ImpqError("backend gptq needs activation statistics")
        if not torch.isfinite(statistics.gram).all():
            raise ImpqError("the inputs hold NaN or infinity, which GPTQ cannot use; try --dtype float32")
        reached = statistics.tokens > 0
        from torch import nn

        gptq = _library()
        config = gptq.QuantizeConfig(
            bits=int(choice.bits), group_size=choice.group_size, sym=self.options.symmetric, desc_act=False,
            act_group_aware=self.options.group_aware, mse=2.0 if self.options.clip_search else 0.0,
            damp_percent=self.options.damping, device="cpu", offload_to_disk=False)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight.data = weight.clone()
        task = gptq.GPTQ(linear, qcfg=config)
        task.quantizer.configure(perchannel=True)
        task.H = statistics.gram * (2.0 / statistics.tokens) if reached else torch.eye(weight.shape[1])
        task.nsamples = max(1, statistics.tokens)
        linear.weight.data, scales, zeros, index, _, loss, damping, _ = task.quantize()
        packed = self._packed(choice, weight.shape)
        packed.pack_original(linear, scales, zeros, index)
        tensors = {name: getattr(packed, name).clone() for name in TENSORS}
        if not isinstance(loss, float):  # the library returns a word if it gave up on the Hessian
            raise ImpqError(f"GPTQ failed at {choice} bits ({loss}); more calibration text or damping may help")
        record = {"damping": float(damping), "loss": loss}
        return Variant(choice, tensors, record if reached else {**record, "unreached": 1.0})

    def pack(self, codes: torch.Tensor, scales: torch.Tensor, choice: Choice) -> Variant:
        """A variant from signed symmetric codes (rows, columns) and 16-bit scales (rows, groups)."""
        import torch
        from torch import nn

        rows, columns = codes.shape
        index = torch.arange(columns, dtype=torch.int32) // choice.group_size
        linear = nn.Linear(columns, rows, bias=False)
        linear.weight.data = codes.float() * scales.float()[:, index.long()]
        zeros = torch.full_like(scales, 2.0 ** (int(choice.bits) - 1), dtype=torch.float32)
        packed = self._packed(choice, codes.shape)
        packed.pack_original(linear, scales.float(), zeros, index)
        return Variant(choice, {name: getattr(packed, name).clone() for name in TENSORS})

    def dequantize(self, variant: Variant, linear: LinearSpec) -> torch.Tensor:
        """(code - zero) * scale, with the 16-bit scales that are stored."""
        packed = self._packed(variant.choice, (linear.rows, linear.columns))
        for name, tensor in variant.tensors.items():
            setattr(packed, name, tensor)
        return packed.dequantize_weight().T.float().contiguous()

    def _packed(self, choice: Choice, shape: Any) -> Any:
        return _library().TorchLinear(
            bits=int(choice.bits), group_size=choice.group_size, sym=self.options.symmetric, desc_act=False,
            in_features=shape[1], out_features=shape[0], bias=False).eval()


@dataclass(frozen=True)
class _Library:
    GPTQ: Any
    QuantizeConfig: Any
    TorchLinear: Any


@lru_cache(maxsize=1)
def _library() -> _Library:
    """The classes of gptqmodel, imported without its banner. On two cores gptqmodel needs the number of workers."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(1, os.cpu_count() or 1)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.quantization.config import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
    return _Library(GPTQ, QuantizeConfig, TorchLinear)
