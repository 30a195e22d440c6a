"""A stand-in for an accelerator: tensors that say they are on another device and hold their numbers in host memory.

Within ``device_there()`` torch has the device ``other``. It refuses what accelerators refuse, so code that runs on it
mixes no devices, and its results are those of the processor bit for bit, because the same kernels compute them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "other"
"""Name of the device in torch."""

MEMORY = 8_000_000_000
"""Bytes of memory that the device says it has."""

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""Operators that take tensors of two devices."""

_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default,
            torch.ops.aten._index_put_impl_.default)
"""Operators whose indices may be on the host."""

_WHOLE = ("silu_backward",)
"""Operators that torch makes of others, which round otherwise, unless the device has a kernel for them."""

_GET_DATA, _SET_DATA = (getattr(torch.Tensor.data, name) for name in ("__get__", "__set__"))


class Refused(RuntimeError):
    """An accelerator cannot do this."""


class _Module:
    """What torch knows as ``torch.other``: the device is there as long as ``used`` is set."""

    def __init__(self) -> None:
        self.used: StandIn | None = None
        library: Any = torch.library.Library  # which has no types
        self.kernels = library("aten", "IMPL", "PrivateUse1")  # they are gone if it is garbage

    def is_available(self) -> bool:
        return self.used is not None

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return int(self.is_available())

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "a stand-in in host memory"

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY - (self.used.held if self.used else 0), MEMORY

    def manual_seed_all(self, seed: int) -> None:
        """Nothing to seed: random numbers are those of the processor's generator."""

    def _is_in_bad_fork(self) -> bool:
        return False


class StandIn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The device, while it is there. Sizes are bytes.

    Attributes:
        name: its name in torch.
        device: the device.
        moved_in, moved_out: bytes copied from the host and to it.
        reads: number of copies to the host; each makes the host wait for an accelerator.
        held, peak: bytes of all tensors on the device, now and at most. Views are not counted twice.
        calls: how often each operator ran on the device.
    """

    def __init__(self, float64: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name, self.device = NAME, torch.device(NAME, 0)
        self.moved_in = self.moved_out = self.reads = self.held = self.peak = 0
        self.calls: Counter[str] = Counter()
        self._float64 = float64
        self._users: Counter[int] = Counter()

    def forget(self) -> None:
        """Count anew: what was moved, read and called so far, and the peak."""
        self.moved_in = self.moved_out = self.reads = 0
        self.peak = self.held
        self.calls.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator: on the processor if no tensor of the device takes part, else as the device would."""
        kwargs = kwargs or {}
        tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
        if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter, _Tensor) for tensor in tensors):
            return func(*args, **kwargs)  # another subclass, which calls operators of what it wraps
        here = [tensor for tensor in tensors if isinstance(tensor, _Tensor)]
        target = kwargs.get("device")
        outside = target is not None and not _is_here(target)
        if not here and (target is None or outside):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in here):
            with self:  # operators made of others arrive whole in inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._refuse_host(func, args, kwargs, tensors)
        return self._run(func, args, kwargs, here, outside)

    def _refuse_host(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
        """Raises Refused if an operator on the device takes numbers of the host, but for scalars and indices."""
        here = any(isinstance(tensor, _Tensor) for tensor in tensors)
        hosts = [tensor for tensor in tensors if not isinstance(tensor, _Tensor) and tensor.dim()
                 and tensor.device.type == "cpu"]
        indices = func in _INDEXED and isinstance(args[0], _Tensor)
        if here and hosts and func not in _COPIES and not indices:
            raise Refused("Expected all tensors to be on the same device, but found at least two devices, "
                          f"{NAME}:0 and cpu! (when checking arguments of {func})")
        generator = kwargs.get("generator")
        if generator is not None and not _is_here(generator.device):
            raise Refused(f"Expected a '{NAME}' device type for generator but found '{generator.device}'")

    def _run(self, func: Any, args: Any, kwargs: Any, here: list[_Tensor], outside: bool) -> Any:
        self.calls[str(func)] += 1
        plain_args, plain_kwargs = tree_map(lambda item: item.kept if isinstance(item, _Tensor) else item,
                                            (args, kwargs))
        if kwargs.get("device") is not None:
            plain_kwargs["device"] = kwargs["device"] if outside else torch.device("cpu")
        if "pin_memory" in plain_kwargs:
            plain_kwargs["pin_memory"] = False
        result = func(*plain_args, **plain_kwargs)
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # the shape of the tensor itself, beside that of its numbers
                func(*args, **kwargs)
        self._count(func, args, here, outside)
        if outside:  # a copy to the host, or a tensor made there
            return result
        if func is torch.ops.aten.copy_.default:
            return args[0]
        own = {id(tensor.kept): tensor for tensor in here}  # an operator in place returns what it was given

        def placed(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            return own[id(item)] if id(item) in own else self._place(item, func)

        return tree_map(placed, result)

    def _count(self, func: Any, args: Any, here: list[_Tensor], outside: bool) -> None:
        if func is torch.ops.aten._local_scalar_dense.default or (outside and here):
            self.reads += 1
            self.moved_out += args[0].nbytes
        elif func is torch.ops.aten._to_copy.default and not here:
            self.moved_in += args[0].nbytes
        elif func is torch.ops.aten.copy_.default and not isinstance(args[1], _Tensor):
            self.moved_in += args[1].nbytes
        elif func is torch.ops.aten.copy_.default and not isinstance(args[0], _Tensor):
            self.reads += 1
            self.moved_out += args[1].nbytes

    def _place(self, tensor: torch.Tensor, func: Any) -> torch.Tensor:
        """A result as a tensor of the device."""
        if isinstance(tensor, _Tensor):
            return tensor
        if tensor.dtype == torch.float64 and not self._float64:
            raise Refused(f"Cannot convert a tensor to float64: the device {NAME} has no float64 (in {func})")
        with torch.inference_mode(tensor.is_inference()):  # as views of inference tensors are, outside of the mode too
            placed = _Tensor(tensor)
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._users[key]:
            self.held += size
            self.peak = max(self.peak, self.held)
        self._users[key] += 1
        weakref.finalize(placed.kept, self._drop, key, size)
        return placed

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self.held -= size


class _Tensor(torch.Tensor):
    """A tensor of the device, which keeps its numbers in a tensor of the host."""

    kept: torch.Tensor

    @staticmethod
    def __new__(cls, kept: torch.Tensor) -> _Tensor:
        made: _Tensor = torch.Tensor._make_wrapper_subclass(
            cls, kept.size(), strides=kept.stride(), dtype=kept.dtype, storage_offset=kept.storage_offset(),
            device=torch.device(NAME, 0))
        made.kept = kept.detach()
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{NAME}({self.kept!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if _MODULE.used is None:
            raise Refused(f"{func} takes a tensor of the device {NAME}, which is not there any more")
        with _MODULE.used:  # another subclass, which wraps this one, was called by the mode
            return func(*args, **(kwargs or {}))

    def numpy(self, **kwargs: Any) -> Any:
        """Refused, as for every device but the processor."""
        raise Refused(f"can't convert {NAME}:0 device type tensor to numpy: use Tensor.cpu() first")

    def tolist(self) -> Any:
        """The numbers, which are copied to the host."""
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        """The address of the numbers, which tells tensors that share them."""
        return self.kept.data_ptr()


class _Functions(TorchFunctionMode):
    """What torch does below any operator, done for the device: tensors of literals, and data of another device."""

    def __init__(self, evicts: bool) -> None:
        self._evicts = evicts

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``torch.tensor(numbers, device="other")`` is made on the host and moved; a tensor whose ``data`` becomes that
        of another device is swapped for one of that device."""
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device) if _is_here(device) else func(*args, device=device, **kwargs)
        if func is torch.Tensor.backward and isinstance(args[0], _Tensor):
            return _backward(*args, **kwargs)
        if func == _GET_DATA and isinstance(args[0], _Tensor):
            return args[0].detach()
        if func == _SET_DATA:
            tensor, value = args
            if isinstance(tensor, _Tensor) and not isinstance(value, _Tensor) and not self._evicts:
                raise Refused(f"a tensor of the {value.device} is assigned to the data of one on {NAME}:0")
            if isinstance(tensor, _Tensor) or isinstance(value, _Tensor):
                made = value.detach()
                if isinstance(tensor, torch.nn.Parameter):
                    made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
                return torch.utils.swap_tensors(tensor, made)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    try:
        tensor.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "device_ready_queues" not in str(error):
            raise
        raise RuntimeError("torch looked for devices before this one was there: import impq_core.testing.device before "
                           "the first backward pass of the process") from error


@contextlib.contextmanager
def device_there(float64: bool = False, evicts: bool = False) -> Iterator[StandIn]:
    """Torch has the device ``other`` as its accelerator; one context at a time.

    What raises within it, as on an accelerator: an operator over tensors of two devices (scalars of the host, and
    indices of the host, are permitted), ``numpy`` of a tensor, a generator of the host, and float64. What raises beyond
    that: a tensor of the host as the ``data`` of a tensor of the device, because the next operator would mix devices;
    and the use of tensors of the device after the context.

    Torch has the name of the device from the import of this module on, but the device only in the context.

    Raises:
        RuntimeError: the device is there already; or, from a backward pass, one ran before this module was imported.

    Args:
        float64: whether the device has float64, as CUDA has and MPS has not.
        evicts: permit tensors of the host as ``data``, which is a way of taking a parameter off the device.
    """
    if _MODULE.used is not None:
        raise RuntimeError(f"the device {NAME} is there already")
    _MODULE.used = StandIn(float64)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module moves its parameters and keeps those tied
    try:
        with _Functions(evicts), _MODULE.used as device:
            yield device
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        _MODULE.used = None


def _registered() -> _Module:
    """Give torch the device, and return the module that torch knows it by."""
    module = _Module()

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return module.is_available()

        def has_primary_context(self, dev_id: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    backend_registration._setup_privateuseone_for_python_backend(NAME, module, Hook())
    for name in _WHOLE:  # the kernel is never called, because StandIn gets the operator first
        module.kernels.impl(name, lambda *args: NotImplemented)
    return module


_MODULE = _registered()
"""At import, because torch's gradients look for devices once, at the first backward pass."""


def _is_here(device: Any) -> bool:
    return torch.device(device).type in (NAME, "privateuseone")
