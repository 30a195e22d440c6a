"""A language model of its own code with the habits of released ones: experts, routers that return a tuple, shared
experts that read rows without windows, arguments between blocks, a forward that lacks ``logits_to_keep``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

WIDTH, EXPERTS, BLOCKS = 64, 4, 3


class ToyConfig(PretrainedConfig):
    model_type = "toy"
    num_hidden_layers = BLOCKS


class Router(nn.Linear):
    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(rows)
        return scores, scores[:, :-1].argmax(dim=-1)  # the last expert is never chosen


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(functional.silu(self.up(rows)))
        return result


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = Router(WIDTH, EXPERTS, bias=False), Expert()
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.view(-1, WIDTH)
        _, chosen = self.router(rows)
        out = self.shared(rows)
        for number, expert in enumerate(self.experts[:-1]):
            mine = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, mine, expert(rows[mine]))
        return out.view_as(hidden)


class Block(nn.Module):
    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.feed = Mixture() if experts else Expert()

    def forward(self, hidden_states: torch.Tensor, gain: torch.Tensor | float = 1.0, **handed: Any) -> torch.Tensor:
        for value in handed.values():
            if isinstance(value, dict):
                value[len(value)] = hidden_states.mean()
        steps = torch.arange(1, hidden_states.shape[1] + 1)[None, :, None]
        hidden_states = hidden_states + gain * self.mix(self.norm(hidden_states).cumsum(dim=1) / steps)
        result: torch.Tensor = hidden_states + self.feed(self.norm(hidden_states))
        return result


class Body(nn.Module):
    """Args: hands: what the blocks are given beside the hidden states."""

    def __init__(self, experts: bool, hands: str) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(259, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Block(experts) for _ in range(BLOCKS))
        self.hands = hands
        self.kept: dict[int, torch.Tensor] = {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        positional: tuple[Any, ...] = ()
        handed: dict[str, Any] = {}
        if self.hands == "position":
            positional = (torch.linspace(0.5, 1.5, ids.shape[1])[None, :, None],)
        elif self.hands == "text":
            handed = {"gain": 1 + hidden.mean(dim=-1, keepdim=True)}
        elif self.hands == "dict":
            handed = {"shared_states": {}}
        elif self.hands == "kept dict":
            handed = {"shared_states": self.kept}
        elif self.hands == "cache":
            handed = {"past": DynamicCache()}
        elif self.hands == "nested":
            handed = {"seen": [{"text": (ids,)}]}
        for block in self.layers:
            hidden = block(hidden, *positional, **handed)
        normed: torch.Tensor = self.norm(hidden)
        return normed


class Toy(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def __init__(self, experts: bool = False, hands: str = "") -> None:
        super().__init__(ToyConfig())
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(0)
            self.model, self.lm_head = Body(experts, hands), nn.Linear(WIDTH, 259, bias=False)
        finally:
            torch.random.set_rng_state(state)
        self.eval().requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids)))
