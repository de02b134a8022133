"""Tensors that say they are on CUDA, and the mode that computes them on the CPU under a device's rules."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.support.cuda.usage import Usage, our_line

MADE_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_LAUNCH = MADE_EMPTY | {
    "alias", "as_strided", "detach", "is_pinned", "lift", "lift_fresh", "set_", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
# Operators whose result has a shape, or is a number, that depends on values.
READ_BY_HOST = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "histc", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
INDEXING = {"_index_put_impl_", "index", "index_put", "index_put_"}
COPYING = {"_to_copy", "copy_"}


class EmulatedTensor(Tensor):
    """A tensor on an emulated device; `inner` has the values, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> EmulatedTensor:
        made: EmulatedTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()")

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"EmulatedTensor({self.device}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if Devices.current is None:
            raise RuntimeError(f"{func} on {cls.__name__} outside of emulated_devices()")
        with Devices.current:
            return func(*args, **(kwargs or {}))


class Devices(TorchDispatchMode):
    """Runs operators of emulated tensors on the CPU, and notes what they would have asked of a device.

    Attributes:
        usage: where it is noted.
        device: index of the current device.
        recorded: what a graph that is being captured has recorded; None while there is none.
        most_values: floating tensors with more elements have no values, only a shape: for models of the real size.
        runs_kernels: whether kernels write what they are to write.
    """

    current: Devices | None = None

    def __init__(self, usage: Usage, most_values: float, runs_kernels: bool) -> None:
        super().__init__()
        self.usage, self.most_values, self.runs_kernels, self.device = usage, most_values, runs_kernels, 0
        self.recorded: list[Callable[[], Any]] | None = None
        self._pinned: dict[int, Any] = {}

    def pin(self, host: Tensor) -> Tensor:
        """Marks a tensor of the host as one that a device reads and writes by itself."""
        # A storage stays, and so its address stays its own, as long as it is remembered here.
        self._pinned[host.untyped_storage().data_ptr()] = host.untyped_storage()
        return host

    def is_pinned(self, host: Tensor) -> bool:
        """Whether a tensor of the host is part of one that was pinned."""
        return host.untyped_storage().data_ptr() in self._pinned

    def wait(self, why: str) -> None:
        """Notes that the host waits, which it must not do while a graph is captured."""
        if self.recorded is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why} at {our_line()}")
        self.usage.waits[f"{our_line()} {why}"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        on_device = [one for one in tensors if isinstance(one, EmulatedTensor)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not on_device and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        if func._schema.name != "aten::_to_copy" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        name = func._schema.name.partition("::")[2]
        self._check_devices(func, name, tensors, on_device)
        self._note_waits(name, args, kwargs, target)
        return self._run(func, name, args, kwargs, on_device, target)

    def _check_devices(self, func: Any, name: str, tensors: list[Tensor], on_device: list[EmulatedTensor]) -> None:
        """Raises what PyTorch raises where tensors are on several devices."""
        if name in COPYING:
            return
        indexes = name in INDEXING  # which takes indices on the host
        loose = [] if indexes else [x for x in tensors if not isinstance(x, EmulatedTensor) and x.dim()]
        devices = {x.device for x in on_device} | {x.device for x in loose}
        if len(devices) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {devices}: {func} at {our_line()}"
            )

    def _note_waits(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], target: torch.device | None
    ) -> None:
        if name == "_to_copy" and target is not None:
            self._note_copy(args[0], args[0].device, target, bool(kwargs.get("non_blocking")), pins=True)
        elif name == "copy_":
            to, source = args[:2]
            host = source if isinstance(to, EmulatedTensor) else to
            asks = bool(len(args) > 2 and args[2]) or bool(kwargs.get("non_blocking"))
            self._note_copy(host, source.device, to.device, asks, pins=False)
        elif name in READ_BY_HOST:
            self.wait(name)
        elif name in INDEXING:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{name} by a mask")
                elif index is not None and not isinstance(index, EmulatedTensor):
                    self.wait(f"{name} by an index on the host")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)

    def _note_copy(self, host: Tensor, source: torch.device, to: torch.device, asks: bool, pins: bool) -> None:
        """Notes a copy; with `pins` PyTorch allocates pinned memory for one to the host that is not to wait."""
        if source.type == to.type == "cuda":
            if source.index != (self.device if to.index is None else to.index):
                self.usage.crossings[our_line()] += host.nbytes
        elif host.numel():
            if self.recorded is not None:
                raise RuntimeError(f"a captured graph would copy what the host has now, again and again: {our_line()}")
            goes_back = to.type == "cpu"
            if not asks or not (self.is_pinned(host) or (goes_back and pins)):
                self.wait("copy to the host" if goes_back else "copy from the host")

    def _run(
        self,
        func: Any,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        on_device: list[EmulatedTensor],
        target: torch.device | None,
    ) -> Any:
        device = target or on_device[0].device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", self.device)
        given: tuple[Any, dict[str, Any]] = tree_map(
            lambda x: x.inner if isinstance(x, EmulatedTensor) else x, (tuple(args), kwargs)
        )
        if target is not None and target.type == "cuda":
            given[1]["device"] = torch.device("cpu")
        given[1].pop("pin_memory", None)
        writes = _writes(func)
        is_view = not writes and any(one.alias_info is not None for one in func._schema.returns)
        out = self._computed(func, name, *given)
        if name in MADE_EMPTY and not out.is_meta:
            out.fill_(_anything(out.dtype) if self.runs_kernels else 0)
        if is_view or name in NO_LAUNCH:
            self.usage.views[name] += 1
        elif name != "_local_scalar_dense":
            self.usage.launches[name] += 1
            if self.recorded is not None:
                self.recorded.append(_replayed(func, given, out, writes))
        known = {id(one.inner): one for one in on_device}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor) or device.type != "cuda":
                return x
            if id(x) in known:
                return known[id(x)]
            made = EmulatedTensor(x, device)
            if is_view or name in NO_LAUNCH - MADE_EMPTY:
                made._base_of_view = on_device[0] if on_device else None  # type: ignore[attr-defined]
            else:
                self.usage.allocated(device.index, x.nbytes)
                weakref.finalize(made, self.usage.freed, device.index, x.nbytes)
            return made

        return tree_map(wrapped, out)

    def _computed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The result of an operator on the CPU; without values where an argument has none, or it would be too large."""
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        empty = any(one.is_meta for one in tensors)
        if not empty and self.most_values == float("inf"):
            return func(*args, **kwargs)
        goes_back = name == "_to_copy" and args[0].is_meta and kwargs.get("device") == torch.device("cpu")
        if empty and name == "_local_scalar_dense":
            raise RuntimeError(f"{name} of a tensor without values at {our_line()}")
        shapes_only = tree_map(_on_meta, (args, kwargs))
        if not empty:
            shapes = [x for x in tree_flatten(func(*shapes_only[0], **shapes_only[1]))[0] if isinstance(x, Tensor)]
            large = any(x.is_floating_point() and x.numel() > self.most_values for x in shapes)
            return func(*shapes_only[0], **shapes_only[1]) if large else func(*args, **kwargs)
        if goes_back:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if not tensors[0].is_meta and _writes(func):
            return args[0]  # what has values keeps them
        return func(*shapes_only[0], **shapes_only[1])


def _on_meta(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("meta")
    return x.to("meta") if isinstance(x, Tensor) else x


def _writes(func: Any) -> bool:
    return any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)


def _anything(dtype: torch.dtype) -> float | int:
    """Content of memory that nobody has written: nothing that anyone may rely on."""
    if dtype.is_floating_point:
        return torch.nan
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _replayed(func: Any, given: tuple[Any, dict[str, Any]], out: Any, writes: bool) -> Callable[[], Any]:
    """Work that a graph does again: the operator, whose result goes where it went when the graph was captured."""
    has_values = not any(isinstance(x, Tensor) and x.is_meta for x in tree_flatten((given, out))[0])

    def replay() -> None:
        if not has_values:
            return
        again = func(*given[0], **given[1])
        if not writes:
            for to, values in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(to, Tensor):
                    to.copy_(values)

    return replay
