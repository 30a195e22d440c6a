"""The recipe for llama-quantize: a type for every tensor, no weights."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from impq_core.errors import ImpqError
from impq_core.files import write_text
from impq_core.interfaces import Checkpoint, Exporter


class LlamaCppRecipe(Exporter):
    """Lines ``tensor=type`` for ``llama-quantize --tensor-type-file``: GGUF tensor names and k-quants."""

    TYPES = {8: "q8_0", 6: "q6_k", 5: "q5_k", 4: "q4_k", 3: "q3_k", 2: "q2_k"}  # noqa: RUF012
    NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",  # noqa: RUF012
             "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up"}
    ROW = 256
    """Weights in a block of a k-quant; llama-quantize takes another type if a tensor's rows are no multiple of it."""

    def export(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write tensor-types.txt, and warn of tensors for which llama-quantize will take another type.

        Raises:
            ImpqError: llama.cpp has no name for a linear, or no k-quant of a width.
        """
        lines = []
        for name, choice in checkpoint.widths.items():
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
            if not match or match[2] not in self.NAMES:
                raise ImpqError(f"llama.cpp has no tensor name for {name}")
            if choice and int(choice.bits) not in self.TYPES:
                raise ImpqError(f"llama.cpp has no k-quant of {choice} bits (for {name})")
            kind = self.TYPES[int(choice.bits)] if choice else "f16"
            lines.append(rf"^blk\.{match[1]}\.{self.NAMES[match[2]]}\.weight$={kind}")
        write_text(folder / "tensor-types.txt", "\n".join(lines) + "\n")
        plan = checkpoint.plan
        odd = [linear for layer, choice in zip(plan.space.everyone, plan.space.assignment(plan.pick), strict=True)
               for linear in layer.linears if choice and choice.bits < 8 and linear.columns % self.ROW]
        if odd:
            warnings.warn(f"llama-quantize will not follow {len(odd)} of {len(lines)} lines: k-quants take rows of a "
                          f"multiple of {self.ROW} weights, not the {odd[0].columns} of {odd[0].name}; such tensors "
                          "get types of 4 bits and more", RuntimeWarning, stacklevel=2)
