"""A fake device for tests: it computes on the CPU, refuses to meet tensors of the CPU, and counts what a GPU would do.

    with pretend_device() as counts:
        x = torch.randn(4, 3).to(DEVICE)

A GPU runs each operator as at least one kernel. The host waits where a result decides a shape or becomes a number, and
for every copy between host and device that does not say `non_blocking`. Threads that start meanwhile (a loader's) see
the device too; what they do is counted apart, as it does not stop the thread that trains.
PyTorch ships what registers such a device (`PrivateUse1`, for a backend written in Python).

Not covered: autograd, streams, collectives.
"""

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.utils.backend_registration as registration
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

registration._setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "pretend:0"))
"""With TEST_DEVICE=cuda a GPU takes the place of the fake device (make gpu PART=tests)."""
counted = pytest.mark.skipif(DEVICE.type != "pretend", reason="a GPU counts neither kernels nor waits")
"""For tests that look at counts."""
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "equal",
}
"""Operators that give a number to the host, or a shape that depends on values."""
LOOKS = "view _unsafe_view reshape expand slice select transpose t permute unsqueeze squeeze detach alias as_strided"
ALLOCATES = "empty empty_like new_empty empty_strided unbind split"
FREE = {*LOOKS.split(), *ALLOCATES.split()}
"""Operators that only look at memory, or allocate it."""


WIDE_PRODUCTS = {torch.ops.aten.mm.dtype, torch.ops.aten.mm.dtype_out}
"""Products of bfloat16 matrices, summed and returned in float32."""


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
        _count("waits", "tolist")
        _count_bytes("bytes to host", self)
        return self.inner.tolist()


class _Mode(TorchDispatchMode):
    """Sees operators that create tensors on the device, and those of the CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


_counts: Counter[str] = Counter()
_lock = threading.Lock()


def _count(*names: str, n: int = 1) -> None:
    """Names as they are where the training thread works, and with "threads: " before them elsewhere."""
    elsewhere = "" if threading.current_thread() is threading.main_thread() else "threads: "
    with _lock:
        for name in names:
            _counts[elsewhere + name] += n


def _count_bytes(name: str, tensor: Tensor) -> None:
    _count(name, n=tensor.numel() * tensor.element_size())


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function.overloadpacket.__name__
    tensors: list[Tensor] = []
    tree_map(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, (args, kwargs))
    ours = {id(_inner(tensor)): tensor for tensor in tensors if isinstance(tensor, Pretend)}
    copies = name in ("_to_copy", "copy_")
    if ours and not copies and any(not isinstance(tensor, Pretend) and tensor.dim() for tensor in tensors):
        raise RuntimeError(f"{name}: tensors of the CPU and of the device meet")
    on_device = bool(ours)
    plain = kwargs
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == "pretend"
        plain = kwargs | {"device": "cpu"}
    inner = tree_map(_inner, (args, plain))
    if function in WIDE_PRODUCTS:  # CUDA has it, the CPU does not
        result = torch.mm(*(each.float() for each in inner[0][:2]), **inner[1])
    else:
        result = function(*inner[0], **inner[1])
    if on_device or ours:
        _note(name, args, kwargs, on_device, bool(ours), result)
    if name == "copy_":
        return args[0]
    if not on_device:
        return result

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return ours[id(value)] if id(value) in ours else Pretend(value)  # in place: the tensor that was given

    return tree_map(outer, result)


def _note(name: str, args: Any, kwargs: dict[str, Any], on_device: bool, ours: bool, result: Any) -> None:
    """Count one operator, whose `result` is on the device or not, and of whose arguments some are `ours`."""
    masks = name in ("index", "index_put", "index_put_") and any(
        isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
    )
    if name == "copy_":
        to_device, to_host = not isinstance(args[1], Pretend), not isinstance(args[0], Pretend)
        waits = (to_device or to_host) and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    else:
        to_device, to_host = name == "_to_copy" and not ours, name == "_to_copy" and not on_device
        waits = (to_device or to_host) and not kwargs.get("non_blocking")
    if to_device:
        _count("copies to device")
        _count_bytes("bytes to device", result)
    _count("copies to host", n=to_host)
    if to_host or name == "_local_scalar_dense":
        _count_bytes("bytes to host", args[0] if name == "_local_scalar_dense" else result)
    _count("sums in an open order", n=_is_open_sum(name, args, kwargs))
    _count(
        name,
        *(["waits"] if waits or masks or name in WAITS else []),
        *(["kernels"] if name not in FREE else []),
    )


def _is_open_sum(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether CUDA's kernel would add floating-point numbers to one place with atomic additions, in any order.

    After the list at torch.use_deterministic_algorithms: of what adds by an index only where two indices are equal.
    """
    if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return False
    name, index = name.removesuffix("_"), None
    if name in ("index_add", "scatter_add", "scatter_reduce"):
        index = args[2]
    elif name == "index_put" and (args[3] if len(args) > 3 else kwargs.get("accumulate")):
        index = args[1][0]
    elif name in ("cumsum", "put", "_embedding_bag_dense_backward", "embedding_dense_backward", "histc"):
        return True
    return index is not None and len(_inner(index).unique(dim=0)) < len(index)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretend) else value


@contextmanager
def pretend_device() -> Iterator[Counter[str]]:
    """The device, and the counts of kernels, waits, bytes and operators since it began."""
    _counts.clear()
    if DEVICE.type != "pretend":
        yield _counts
        return
    originals = torch.tensor, Tensor.pin_memory, threading.Thread.run, torch.inference_mode.__enter__

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """torch.tensor copies below every dispatch mode; a copy from the host makes it wait."""
        if device is None or torch.device(device).type != "pretend":
            return originals[0](data, *args, device=device, **kwargs)
        made = Pretend(originals[0](data, *args, **kwargs))
        _count("waits")
        _count_bytes("bytes to device", made)
        return made

    def run(self: threading.Thread) -> None:
        with _Mode():  # a mode is one thread's
            originals[2](self)

    def enter(
        self: Any,
    ) -> None:  # views of tensors made in inference mode need more than a Python backend has
        self._inference_mode_context = torch.no_grad()
        self._inference_mode_context.__enter__()

    torch.tensor, torch.inference_mode.__enter__ = tensor, enter
    Tensor.pin_memory = lambda self: self.clone()  # pyright: ignore[reportAttributeAccessIssue]
    threading.Thread.run = run
    try:
        with _Mode():
            yield _counts
    finally:
        torch.tensor, Tensor.pin_memory, threading.Thread.run, torch.inference_mode.__enter__ = originals
