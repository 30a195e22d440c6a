"""A model in which all that holds a weight matrix is an ``nn.Linear``: GPT-2's Conv1D, and fused experts of mixtures.

transformers keeps the experts of a mixture in parameters (experts, rows, columns). Here each expert gets linears of its
own, called ``experts.3.gate_proj``, ``experts.3.up_proj`` and ``experts.3.down_proj``, whose weights are views of those
parameters. An expert then reads the tokens that are routed to it, and no others. Everything else in the module
(activation, norm, limits) stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from impq_core.errors import ImpqError


class FromConv1D(nn.Linear):
    """A linear made of a Conv1D, which files store transposed: (columns, rows)."""


def to_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, Conv1D modules and fused experts by linears; the model computes what it did.

    Args:
        model: with weights or on the meta device.

    Returns:
        the model.

    Raises:
        ImpqError: linears of experts do not give what the fused experts gave.
    """
    checked: set[type[nn.Module]] = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, _from_conv1d(module))
        elif (forward := _forward_of(module)) is not None:
            first = type(module) not in checked and not any(p.is_meta for p in module.parameters())
            inputs = _example(module) if first else ()
            before = module(*inputs) if first else None
            _split(module)
            vars(module)["forward"] = _bound(module, forward)
            checked.add(type(module))
            if before is not None and not torch.allclose(module(*inputs), before, rtol=0.0, atol=_tolerance(before)):
                raise ImpqError(f"the experts of {type(model).__name__} ({name}) compute more than linears and an "
                                "activation: this architecture is not supported")
    return model


def _tolerance(output: torch.Tensor) -> float:
    return max(1e-4, 4 * torch.finfo(output.dtype).eps) * float(output.abs().max())


def _from_conv1d(conv: Conv1D) -> nn.Linear:
    columns, rows = conv.weight.shape
    linear = FromConv1D(columns, rows, device="meta")
    linear.weight = nn.Parameter(conv.weight.data.T, requires_grad=False)
    linear.bias = conv.bias
    return linear


Experts = Callable[..., torch.Tensor]


def _forward_of(module: nn.Module) -> Experts | None:
    """The forward for linears in place of a module's fused experts; None if it holds no fused experts that are known.

    Modules that transformers' experts interface dispatches say their layout. Llama-4's, which are given the rows of
    every expert in order, are (experts, columns, rows).
    """
    up, down = (getattr(module, name, None) for name in (_up(module), "down_proj"))
    if not all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in (up, down)):
        return None
    if hasattr(module, "is_transposed"):
        return _routed
    arguments = list(inspect.signature(type(module).forward).parameters)
    return _batched if arguments == ["self", "hidden_states"] else None


def _up(module: nn.Module) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def _bound(module: nn.Module, forward: Experts) -> Experts:
    signature = inspect.signature(type(module).forward)

    def bound(*args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(*signature.bind(module, *args, **kwargs).args)
    return bound


def _split(module: nn.Module) -> None:
    """Replace the parameters of a module's experts by linears in numbered modules."""
    for name in (_up(module), "down_proj"):
        weights, biases = getattr(module, name).data, getattr(module, f"{name}_bias", None)
        if getattr(module, "is_transposed", True):
            weights = weights.transpose(1, 2)
        delattr(module, name)
        if biases is not None:
            delattr(module, f"{name}_bias")
        # Interleaved rows of gate and up stay together: apart they would be copies.
        split = name == "gate_up_proj" and getattr(module, "is_concatenated", True)
        parts = ("gate_proj", "up_proj") if split else (name,)
        for number, weight in enumerate(weights):
            if str(number) not in module._modules:
                module.add_module(str(number), nn.Module())
            expert = module.get_submodule(str(number))
            chunks = zip(parts, weight.chunk(len(parts)),
                         biases[number].chunk(len(parts)) if biases is not None else [None] * len(parts), strict=True)
            for part, rows, bias in chunks:
                linear = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None, device="meta")
                linear.weight = nn.Parameter(rows, requires_grad=False)
                if bias is not None:
                    linear.bias = nn.Parameter(bias.data, requires_grad=False)
                expert.add_module(part, linear)


def _experts(module: nn.Module) -> Iterator[nn.Module]:
    number = 0
    while str(number) in module._modules:
        yield module._modules[str(number)]  # type: ignore[misc]
        number += 1


def _expert(module: Any, expert: Any, rows: torch.Tensor) -> torch.Tensor:
    """Output of one expert for its rows (tokens, width), without the weights of the router."""
    if "gate_proj" in expert._modules:
        gate, up = expert.gate_proj(rows), expert.up_proj(rows)
        if hasattr(module, "_apply_gate"):
            inner = module._apply_gate(torch.cat([gate, up], dim=-1))
        else:
            inner = module.act_fn(gate) * up
    elif "gate_up_proj" in expert._modules:
        inner = module._apply_gate(expert.gate_up_proj(rows))
    else:
        inner = module.act_fn(expert.up_proj(rows))
    output: torch.Tensor = expert.down_proj(inner)
    return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output


def _routed(module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs.

    Args:
        module: holds the experts.
        hidden: (tokens, width).
        chosen: number of each chosen expert (tokens, choices); one beyond the last expert stands for none.
        weights: of the chosen experts (tokens, choices).
    """
    numbers, order = chosen.flatten().sort(stable=True)
    experts = list(_experts(module))
    counts = torch.bincount(numbers, minlength=len(experts)).tolist()
    parts = []
    for number, slots in enumerate(torch.split(order, counts)):
        rows = hidden[slots // chosen.shape[1]]
        if number < len(experts) and len(slots):
            parts.append(_expert(module, experts[number], rows) * weights.flatten()[slots, None])
        else:
            parts.append(torch.zeros_like(rows))
    summed = torch.cat(parts)[order.argsort()].view(*chosen.shape, -1).sum(dim=1)
    return summed.to(hidden.dtype)


def _batched(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The outputs (experts * tokens, width) of all experts for their rows (experts * tokens, width). Rows of zeros,
    which stand for tokens that are routed elsewhere, are not given to an expert: their output is zero."""
    experts = list(_experts(module))
    outputs = []
    for expert, rows in zip(experts, hidden.view(len(experts), -1, hidden.shape[-1]), strict=True):
        reached = rows.any(dim=-1).nonzero()[:, 0]
        output = torch.zeros_like(rows)
        if len(reached):
            output = output.index_copy(0, reached, _expert(module, expert, rows[reached]))
        outputs.append(output)
    return torch.cat(outputs)


def _example(module: nn.Module) -> tuple[torch.Tensor, ...]:
    """Inputs of a module of fused experts: some tokens, each for two experts."""
    up: torch.Tensor = getattr(module, _up(module))
    width = up.shape[1 if getattr(module, "is_transposed", True) else 2]
    generator = torch.Generator().manual_seed(0)
    count, tokens = len(up), 16
    if not hasattr(module, "is_transposed"):
        return (torch.randn(count * tokens, width, generator=generator).to(up.dtype),)
    chosen = torch.rand(tokens, count, generator=generator).topk(min(2, count)).indices
    return (torch.randn(tokens, width, generator=generator).to(up.dtype), chosen,
            torch.rand(chosen.shape, generator=generator).to(up.dtype))
