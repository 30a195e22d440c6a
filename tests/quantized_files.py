"""Tiny model folders whose weights are quantized already, beside the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import tiny
from safetensors.torch import load_file, save_file

from impq_core.testing import tiny_model
from impq_core.testing.tiny import byte_tokenizer

Tensors = dict[str, torch.Tensor]
"""Tensors by name."""

MXFP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""The numbers of four bits."""


def rewritten(folder: Path, edit: Callable[[Tensors], Tensors], **settings: Any) -> Tensors:
    """Replace the tensors of a model folder by those that ``edit`` returns, and add ``quantization_config``.

    Returns:
        what ``edit`` made the dict of: tensors (changed in place) that the new ones stand for.
    """
    dense = load_file(folder / "model.safetensors")
    save_file(edit(dense), folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    return dense


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear in a block."""
    return name.endswith("_proj.weight")


def llama(folder: Path) -> None:
    """A dense model."""
    tiny_model(folder)


def mixture(folder: Path) -> None:
    """A mixture whose files hold experts one by one."""
    tiny("qwen3_moe").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def fp8(folder: Path, block: int = 32, model: Callable[[Path], object] = llama) -> Tensors:
    """A model with 8-bit floats and a scale for each square block; returns its weights, dequantized."""
    def edit(dense: Tensors) -> Tensors:
        stored: Tensors = {}
        for name, weight in dense.items():
            if not is_linear(name):
                stored[name] = weight
                continue
            rows, columns = (-(-size // block) for size in weight.shape)
            scales = torch.rand(rows, columns) * 0.01 + 0.001
            spread = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[:weight.shape[0], :weight.shape[1]]
            stored[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
            dense[name] = stored[name].float() * spread
        return stored

    torch.manual_seed(0)
    model(folder)
    return rewritten(folder, edit, quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                     weight_block_size=[block, block])


def fp8_whole(folder: Path) -> Tensors:
    """A model with 8-bit floats, one scale for a weight and one for its inputs; returns its weights, dequantized."""
    def edit(dense: Tensors) -> Tensors:
        stored = dict(dense)
        for name in filter(is_linear, list(dense)):
            scale = torch.tensor(0.01 * torch.rand(()).item() + 0.001)
            stored[name] = (dense[name] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored |= {f"{name}_scale_inv": scale, name.replace("weight", "activation_scale"): torch.tensor(0.5)}
            dense[name] = stored[name].float() * scale
        return stored

    torch.manual_seed(0)
    return rewritten(tiny_model(folder), edit, quant_method="fp8", activation_scheme="static", weight_block_size=None)


def mxfp8(folder: Path) -> Tensors:
    """A model with 8-bit floats in blocks of 32 with a power of two; returns its weights, dequantized."""
    def edit(dense: Tensors) -> Tensors:
        stored = dict(dense)
        for name in filter(is_linear, list(dense)):
            exponents = torch.randint(115, 122, (dense[name].shape[0], dense[name].shape[1] // 32))
            spread = (2.0 ** (exponents - 127)).repeat_interleave(32, 1)
            stored[name] = (dense[name] / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = exponents.to(torch.uint8)
            dense[name] = stored[name].float() * spread
        return stored

    torch.manual_seed(0)
    return rewritten(tiny_model(folder), edit, quant_method="mxfp8", weight_block_size=[1, 32], scale_fmt="ue8m0")


def mxfp4(folder: Path) -> Tensors:
    """A mixture whose experts are stored in blocks of 32 numbers of four bits with a power of two; returns its weights,
    dequantized."""
    tiny("gpt_oss").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    def edit(dense: Tensors) -> Tensors:
        stored: Tensors = {}
        for name, weight in dense.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                stored[name] = weight
                continue
            experts, columns, rows = weight.shape
            codes = torch.randint(0, 16, (experts, rows, columns // 32, 32))
            scales = torch.randint(120, 126, (experts, rows, columns // 32))
            stored[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            stored[f"{name}_scales"] = scales.to(torch.uint8)
            numbers = MXFP4[codes] * 2.0 ** (scales[..., None] - 127)
            dense[name] = numbers.flatten(2).transpose(1, 2).contiguous()
        return stored

    torch.manual_seed(0)
    return rewritten(folder, edit, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])


def compressed(folder: Path, bits: tuple[int, ...] = (4,)) -> Tensors:
    """A model in the packed format of compressed-tensors, its linears at one width after another in groups of 32;
    returns its weights, dequantized."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    targets: dict[int, list[str]] = {width: [] for width in bits}

    def edit(dense: Tensors) -> Tensors:
        stored: Tensors = {}
        for number, (name, weight) in enumerate(dense.items()):
            if not is_linear(name):
                stored[name] = weight
                continue
            module, width = name.removesuffix(".weight"), bits[number % len(bits)]
            targets[width].append(module)
            codes = torch.randint(-2**(width - 1), 2**(width - 1), weight.shape)
            scales = torch.rand(weight.shape[0], weight.shape[1] // 32) * 0.01 + 0.001
            stored |= {f"{module}.weight_packed": pack_to_int32(codes.to(torch.int8), width),
                       f"{module}.weight_scale": scales, f"{module}.weight_shape": torch.tensor(weight.shape)}
            dense[name] = codes * scales.repeat_interleave(32, 1)
        return stored

    torch.manual_seed(0)
    dense = rewritten(tiny_model(folder), edit)
    groups = {f"group_{width}": {
        "targets": names if len(bits) > 1 else ["Linear"], "weights": {
            "num_bits": width, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}
        for width, names in targets.items()}
    rewritten(folder, dict, quant_method="compressed-tensors", format="pack-quantized", config_groups=groups,
              quantization_status="compressed", ignore=["lm_head"])
    return dense


def compressed_floats(folder: Path) -> Tensors:
    """A model of 8-bit floats with a scale for each row in the format of compressed-tensors, and scales of activations;
    returns its weights, dequantized."""
    def edit(dense: Tensors) -> Tensors:
        stored = dict(dense)
        for name in filter(is_linear, list(dense)):
            scales = torch.rand(len(dense[name]), 1) * 0.01 + 0.001
            stored[name] = (dense[name] / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scales
            stored[name.replace("weight", "input_scale")] = torch.ones(1)
            dense[name] = stored[name].float() * scales
        return stored

    torch.manual_seed(0)
    floats = {"num_bits": 8, "type": "float", "symmetric": True}
    return rewritten(tiny_model(folder), edit, quant_method="compressed-tensors", format="float-quantized",
                     quantization_status="compressed", ignore=["lm_head"], config_groups={"group_0": {
                         "targets": ["Linear"], "weights": {**floats, "strategy": "channel"},
                         "input_activations": {**floats, "strategy": "tensor", "dynamic": False}}})
