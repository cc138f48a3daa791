"""A fake device for tests: it computes on the CPU, refuses to meet tensors of the CPU, and counts what a GPU would do.

    with pretend_device() as counts:
        x = torch.randn(4, 3).to(DEVICE)

A GPU runs each operator as at least one kernel, and the host waits where a result decides a shape or becomes a number.
PyTorch ships what registers such a device (`PrivateUse1`, for a backend written in Python).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

registration._setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend:0")
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "equal",
}
FREE = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "slice",
        "select",
        "transpose",
        "t",
        "permute",
        "unsqueeze",
    ),
    *(
        "squeeze",
        "detach",
        "alias",
        "as_strided",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "unbind",
        "split",
    ),
}
"""Operators that only look at memory, or allocate it."""


class Pretend(Tensor):
    """A tensor of the fake device. `inner` holds its values; views share memory because their inner tensors do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretend":
        wrapper = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> Any:  # PyTorch refuses it for subclasses
        _counts["waits"] += 1
        return self.inner.tolist()


class _Mode(TorchDispatchMode):
    """Sees operators that create tensors on the device, and those of the CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


_counts: Counter[str] = Counter()


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function.overloadpacket.__name__
    tensors: list[Tensor] = []
    tree_map(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, (args, kwargs))
    ours = {id(_inner(tensor)): tensor for tensor in tensors if isinstance(tensor, Pretend)}
    copies = name in ("_to_copy", "copy_")
    if ours and not copies and any(not isinstance(tensor, Pretend) and tensor.dim() for tensor in tensors):
        raise RuntimeError(f"{name}: tensors of the CPU and of the device meet")
    on_device = bool(ours)
    if "device" in kwargs and kwargs["device"] is not None:
        on_device = torch.device(kwargs["device"]).type == "pretend"
        kwargs = kwargs | {"device": "cpu"}
    result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if on_device or ours:
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        to_host = copies and name == "_to_copy" and not on_device
        _counts["waits"] += name in WAITS or masks or to_host
        _counts["kernels"] += name not in FREE
        _counts[name] += 1
    if copies:
        to_device = isinstance(args[0], Pretend) if name == "copy_" else on_device
        if to_device != isinstance(args[1] if name == "copy_" else args[0], Pretend):
            way = "to device" if to_device else "to host"
            _counts[f"copies {way}"] += 1
            _counts[f"bytes {way}"] += result.nbytes
    if name == "copy_":
        return args[0]
    if not on_device:
        return result

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return ours[id(value)] if id(value) in ours else Pretend(value)  # in place: the tensor that was given

    return tree_map(outer, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretend) else value


@contextmanager
def pretend_device() -> Iterator[Counter[str]]:
    """The device, and the counts of kernels, waits and operators since it began."""
    _counts.clear()
    original = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """torch.tensor copies below every dispatch mode; a copy from the host makes it wait."""
        if device is None or torch.device(device).type != "pretend":
            return original(data, *args, device=device, **kwargs)
        _counts["waits"] += 1
        return Pretend(original(data, *args, **kwargs))

    torch.tensor = tensor
    try:
        with _Mode():
            yield _counts
    finally:
        torch.tensor = original
