"""The weights of a model's blocks: a block has them on the device while it works, and only then. Embedding and head are
always there, and may have other weights than their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

GetWeight = Callable[[], torch.Tensor]
"""Returns a weight (rows, columns) in place of a module's own, on the device, of any float type. Equal ones return the
same weight."""


@dataclass(frozen=True)
class Stored:
    """A parameter as a file has it: a view of one of the file's tensors, in another type if need be.

    Args:
        file: a safetensors file.
        name: of the tensor in it.
        shape, strides, offset: of the view, in numbers.
        dtype: of the parameter in the model.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def read(self, opened: dict[tuple[Path, str], torch.Tensor]) -> torch.Tensor:
        """The parameter, mapped from the file if the types are equal. The map ends with the tensor's last use, so a
        parameter that was read takes no memory afterwards.

        Args:
            opened: whole tensors by file and name, to which this one's is added: hundreds of experts may be views of
                one.
        """
        if (self.file, self.name) not in opened:
            with safe_open(self.file, framework="pt") as stored:
                opened[self.file, self.name] = stored.get_tensor(self.name)
        return opened[self.file, self.name].as_strided(self.shape, self.strides, self.offset).to(self.dtype)


class Placement:
    """Gives blocks their weights for as long as they work.

    Outside of ``loaded`` a streamed block has no weights, and no weight of a linear is replaced: memory does not grow
    with the number of blocks. The rest of the model (embeddings, head, norms) is always resident. A replaced embedding
    or head is resident twice: with its own weight, and with the other.

    Args:
        model: on ``device``, but for the parameters of ``stored``, which are on the meta device.
        blocks: its blocks.
        device: where blocks work.
        stored: the parameters that stay on disk, which must be in blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device,
                 stored: Mapping[nn.Parameter, Stored] | None = None) -> None:
        self.device = device
        self._model, self._blocks = model, tuple(blocks)
        self._stored: dict[nn.Parameter, Stored | GetWeight] = dict(stored or {})
        self._replaced: dict[nn.Module, GetWeight] = {}
        inside = {module for block in self._blocks for module in block.modules()}
        self._outside = dict.fromkeys(module for module in model.modules() if module not in inside)
        self._own_outside: dict[nn.Module, nn.Parameter] = {}  # of replaced modules outside the blocks
        self._holders: dict[nn.Module, list[nn.Module]] = {}  # the modules that have the same weight: of a tied pair
        self._users = [0] * len(self._blocks)
        self._own: dict[tuple[nn.Module, str], nn.Parameter] = {}  # what a loaded block has had before
        self._float32 = False

    @property
    def streamed(self) -> bool:
        """Whether weights of blocks stay on disk until a block works."""
        return bool(self._stored)

    def replace(self, module: nn.Module, source: GetWeight | None) -> None:
        """Let a linear of a block have another weight from the next time that the block is loaded; None is its own. A
        module outside the blocks has it at once, and so has the module that is tied to it."""
        assert not self._own, "a block is loaded"
        if module in self._outside:
            self._replace_resident(module, source)
        elif source is None:
            self._replaced.pop(module, None)
        else:
            self._replaced[module] = source

    def _replace_resident(self, module: nn.Module, source: GetWeight | None) -> None:
        if self._replaced.get(module) == source:
            return
        if module not in self._holders:
            weight = module._parameters["weight"]
            self._holders[module] = [other for other in self._outside if other._parameters.get("weight") is weight]
        if self._replaced.pop(module, None):  # the weight before ends its memory first
            self._install(module, self._own_outside.pop(module))
        if source:
            own = module._parameters["weight"]
            assert own is not None
            with torch.inference_mode(False), torch.no_grad():  # a backward pass may read it
                weight = nn.Parameter(source().to(own.dtype), requires_grad=False)
            self._own_outside[module], self._replaced[module] = own, source
            self._install(module, weight)

    def _install(self, module: nn.Module, weight: nn.Parameter) -> None:
        for holder in self._holders[module]:
            holder._parameters["weight"] = weight

    @contextmanager
    def unreplaced_outside(self) -> Iterator[None]:
        """The context in which embedding and head have their own weights, which are resident all the time."""
        others = {module: module._parameters["weight"] for module in self._own_outside}
        try:
            for module, own in self._own_outside.items():
                self._install(module, own)
            yield
        finally:
            for module, other in others.items():
                assert other is not None
                self._install(module, other)

    @contextmanager
    def unreplaced(self) -> Iterator[None]:
        """The context in which all modules have their own weights. No block may be loaded at its beginning."""
        assert not self._own, "a block is loaded"
        replaced, self._replaced = self._replaced, {}
        try:
            with self.unreplaced_outside():
                yield
        finally:
            self._replaced = replaced

    def original(self, module: nn.Module) -> torch.Tensor:
        """A module's own weight on the device."""
        own = self._own_outside.get(module, module._parameters["weight"])
        return self._read(self._own.get((module, "weight"), own))

    def read_from(self, parameter: nn.Parameter, source: GetWeight) -> None:
        """Read a streamed parameter from elsewhere from now on."""
        assert parameter.is_meta
        self._stored[parameter] = source

    @contextmanager
    def loaded(self, *indices: int) -> Iterator[None]:
        """The context in which blocks have their weights on the device; contexts may be nested."""
        entered: list[int] = []
        try:
            for index in indices:
                if not self._users[index]:
                    self._load(self._blocks[index])
                self._users[index] += 1
                entered.append(index)
            yield
        finally:
            for index in entered:
                self._users[index] -= 1
            if not all(self._users[index] for index in indices):
                self._unload()

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """The context in which all parameters are float32, in blocks when they are loaded."""
        assert not self._own and not self._own_outside, "a block is loaded, or the embedding or the head is replaced"
        inside = {parameter for block in self._blocks for parameter in block.parameters()}
        kept = [(parameter, parameter.data) for parameter in self._model.parameters() if parameter not in inside]
        try:
            self._float32 = True
            for parameter, data in kept:
                parameter.data = data.float()
            yield
        finally:
            self._float32 = False
            for parameter, data in kept:
                parameter.data = data

    def _load(self, block: nn.Module) -> None:
        opened: dict[tuple[Path, str], torch.Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():  # a backward pass may read what is loaded
            for module in block.modules():
                for name, own in list(module._parameters.items()):
                    source = self._replaced.get(module) if name == "weight" else None
                    if own is None or (module, name) in self._own:  # of a module that another block shares
                        continue
                    if source or own.is_meta or self._float32:
                        weight = source() if source else self._read(own, opened)
                        weight = weight.to(torch.float32 if self._float32 and own.is_floating_point() else own.dtype)
                        self._own[module, name] = own
                        module._parameters[name] = nn.Parameter(weight, requires_grad=False)

    def _unload(self) -> None:
        """Restore all modules that no loaded block has."""
        busy = {module for block, users in zip(self._blocks, self._users, strict=True) if users
                for module in block.modules()}
        for module, name in [key for key in self._own if key[0] not in busy]:
            module._parameters[name] = self._own.pop((module, name))

    def _read(self, parameter: nn.Parameter | None,
              opened: dict[tuple[Path, str], torch.Tensor] | None = None) -> torch.Tensor:
        assert parameter is not None
        if not parameter.is_meta:
            return parameter.data
        stored = self._stored[parameter]
        if isinstance(stored, Stored):
            return stored.read({} if opened is None else opened).to(self.device)
        return stored().to(self.device, parameter.dtype)
