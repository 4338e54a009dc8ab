"""What makes the host wait for the device, counted where there is no device.

Meta tensors stand in for those of a GPU, CPU tensors are the host's: a value that the host reads of a meta tensor, a
tensor copied between the two without `non_blocking`, a shape that depends on values. Each would be a
cudaStreamSynchronize (what torch.cuda.set_sync_debug_mode reports). For parts that do not run on meta, `device="cpu"`
counts the reads of every tensor: right where none is the host's own.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
_READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
}
_COPIES = {"_to_copy", "copy_"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_MAKERS = {"tensor", "as_tensor", "asarray", "new_tensor"}


class HostWaits:
    """Within the context `found` grows by one line for every wait: what waits, and the innermost line of this
    repository that asks for it."""

    def __init__(self, device: str = "meta") -> None:
        self.found: list[str] = []
        self.device = device
        self._modes = (_Functions(self), _Dispatched(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        ours = [f for f in frames if f.filename.startswith(str(ROOT)) and "site-packages" not in f.filename]
        at = ours[-1] if ours else frames[-1]
        self.found.append(f"{what} at {Path(at.filename).name}:{at.lineno}: {at.line}")

    def far(self, tensor: Any) -> bool:
        """Whether it lies on the device; a number that became a tensor never does."""
        return isinstance(tensor, Tensor) and tensor.device.type == self.device

    def near(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.dim() > 0 and not self.far(tensor)


class _Functions(TorchFunctionMode):
    """What PyTorch copies before any operator is dispatched: Python numbers to tensors on the device."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self._waits.device == "cpu":
            return result
        if name in _MAKERS and self._waits.far(result) and not self._waits.far(args[name == "new_tensor"]):
            self._waits.note(f"{name}(..., device=)")
        if name in ("__getitem__", "__setitem__") and self._waits.far(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                self._waits.note("indexed by a list")
        return result


class _Dispatched(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, waits = kwargs or {}, self._waits
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(map(waits.far, tensors))
        if name in _READS and on_device:
            waits.note(name)
            if waits.device == "meta" and name == "_local_scalar_dense":
                return args[0].dtype == torch.bool or 1  # some value, so that the step goes on
        elif name == "repeat_interleave" and on_device and kwargs.get("output_size") is None:
            waits.note(name)
        elif name in _INDEXING and on_device:
            self._note_indices(args[1])
        elif name in _COPIES:
            self._note_copy(args, kwargs)
            if waits.far(args[0]) and name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif on_device and any(map(waits.near, tensors)):
            waits.note(f"{name} of tensors in both places")
        return func(*args, **kwargs)

    def _note_indices(self, indices: Any) -> None:
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                self._waits.note("indexed by a mask")
            elif self._waits.near(index):
                self._waits.note("indexed by a tensor of the host")

    def _note_copy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1 and isinstance(args[1], Tensor):  # copy_(to, from, non_blocking)
            to, source, non_blocking = self._waits.far(args[0]), args[1], args[2] if len(args) > 2 else False
        else:
            to = torch.device(kwargs.get("device") or args[0].device).type == self._waits.device
            source, non_blocking = args[0], False
        non_blocking = kwargs.get("non_blocking", non_blocking)
        if self._waits.far(source) and not to:
            self._waits.note("copied to the host")
        elif to and not self._waits.far(source) and not non_blocking:
            self._waits.note("copied to the device without non_blocking")
