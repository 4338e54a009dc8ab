"""Which attention kernel a backbone uses, and flash-attn with variable length behind diffusers' attention dispatch.

diffusers' own `flash_varlen` cuts keys at the number of real ones, which is right only where padding comes last. In
Qwen-Image's sequence [text, padding, image] it keeps the padding and drops the last image tokens. Here the tokens of
each row are permuted so that the real ones come first; real tokens and padding of a row are then two sequences to the
kernel. Shapes depend on no value: no host sync, nothing to recompile.
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

CHOICES = ("auto", "native", "flash3", "flash")
WIDEST_HEAD = 256


@dataclass(frozen=True)
class Choice:
    """name: native | flash | flash3; why: for the log, one line."""

    name: str
    why: str


class Packing(NamedTuple):
    """Real tokens first, row by row: how B rows of S tokens are permuted, and where each sequence begins.

    order: [B S] int64, the token that goes to each place; places: [B S] int64, its inverse; bounds: [2 B + 1] int32, the
    ends of the real tokens and of the padding of every row; longest: no sequence is longer.
    """

    order: Tensor
    places: Tensor
    bounds: Tensor
    longest: int


class _Kernel(NamedTuple):
    module: str
    package: str
    capability: int
    only: bool  # whether newer GPUs are excluded, too


_KERNELS = {
    "flash": _Kernel("flash_attn", "flash-attn", 8, only=False),
    "flash3": _Kernel(
        "flash_attn_interface", "flash-attn 3 (built from the folder hopper/ of its source)", 9, only=True
    ),
}
_DISPATCHED = {
    "native": AttentionBackendName.NATIVE,
    "flash": AttentionBackendName.FLASH_VARLEN,
    "flash3": AttentionBackendName._FLASH_VARLEN_3,
}
_loaded: dict[str, Callable[..., Any]] = {}
"""The kernels in use by name. `use` puts them here: an import inside of a compiled block would break its graph."""
_given: Packing | None = None
"""The packing of the pass that computes, from the processor that received it to the kernel behind diffusers' dispatch."""


def choose(requested: str, device: torch.device, dtype: torch.dtype, head_width: int) -> Choice:
    """The kernel for heads of `head_width` that compute in `dtype` on `device`.

    Raises:
        ValueError: unknown name, or a kernel that cannot run here, with the remedy.
    """
    if requested not in CHOICES:
        raise ValueError(f"model.attention is {requested!r}; choose {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")
    if requested == "native":
        return Choice("native", "as model.attention says")
    candidates = ("flash3", "flash") if requested == "auto" else (requested,)
    obstacles = {name: _obstacle(name, device, dtype, head_width) for name in candidates}
    usable = next((name for name, obstacle in obstacles.items() if obstacle is None), None)
    if usable is not None:
        return Choice(usable, "as model.attention says" if requested == usable else "the fastest that runs here")
    said = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items())
    if requested != "auto":
        raise ValueError(f"model.attention={said}; or set model.attention=auto, which takes what runs here")
    return Choice("native", said)


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why a flash kernel cannot be used, with the remedy; None where it can."""
    kernel = _KERNELS[name]
    if device.type != "cuda":
        return f"it runs on CUDA GPUs and this is {device.type}; set model.attention=native"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and the blocks in {_short(dtype)}; set engine.block_dtype=bfloat16"
    if head_width > WIDEST_HEAD:
        return f"heads of {head_width} are wider than {WIDEST_HEAD}; set model.attention=native"
    major, minor = torch.cuda.get_device_capability(device)
    if major < kernel.capability or (kernel.only and major > kernel.capability):
        wanted = f"{kernel.capability}.x" if kernel.only else f"{kernel.capability}.0 or more"
        return f"it needs a GPU of compute capability {wanted} and this is {major}.{minor}; set model.attention=native"
    try:
        load_kernel(name)
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        return f"{kernel.package} cannot be loaded ({reason}); install it built for this PyTorch"
    return None


def installed(name: str) -> bool:
    """Whether the package of a flash kernel is there, working or not."""
    return importlib.util.find_spec(_KERNELS[name].module) is not None


def load_kernel(name: str) -> Callable[..., Any]:
    """flash_attn_varlen_func of flash-attn 2 ("flash") or 3 ("flash3"); ImportError, OSError without a working build."""
    function: Callable[..., Any] = importlib.import_module(_KERNELS[name].module).flash_attn_varlen_func
    return function


def use(model: nn.Module, name: str) -> None:
    """Every attention of the model that goes through diffusers' dispatch computes with `name` from here on.

    Raises:
        ValueError: a flash kernel for a model none of whose attention goes there.
        ImportError, OSError, AttributeError: it cannot be loaded.
    """
    processors: list[Any] = [getattr(module, "processor", None) for module in model.modules()]
    dispatched = [processor for processor in processors if hasattr(processor, "_attention_backend")]
    if not dispatched and name != "native":
        raise ValueError(f"{type(model).__name__} calls PyTorch's attention itself; set model.attention=native")
    if name != "native":
        _loaded[name] = load_kernel(name)
    for processor in dispatched:
        processor._attention_backend = _DISPATCHED[name]


class Dispatched:
    """Mixin of a backbone all of whose attention goes through diffusers' dispatch; left of the others among the bases."""

    @property
    @abstractmethod
    def head_width(self) -> int: ...

    def use_attention(self, requested: str, device: torch.device, dtype: torch.dtype) -> Choice:
        """Choose the kernel for blocks that compute in `dtype` on `device` (see `choose`), and use it."""
        choice = choose(requested, device, dtype, self.head_width)
        use(self, choice.name)  # type: ignore[arg-type]
        return choice


def pack(mask: Tensor) -> Packing:
    """The packing of rows [B, S] whose mask is True at real tokens, wherever they stand; made on the mask's device."""
    rows, length = mask.shape
    real = mask.bool()
    count = real.sum(dim=1, keepdim=True)
    within = torch.where(real, real.cumsum(1) - 1, count + (~real).cumsum(1) - 1)
    places = (within + torch.arange(rows, device=mask.device)[:, None] * length).flatten()
    order = torch.empty_like(places).scatter_(0, places, torch.arange(rows * length, device=mask.device))
    sizes = torch.cat([count, length - count], dim=1).flatten()
    bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
    return Packing(order, places, bounds, length)


class _Permute(torch.autograd.Function):
    """Rows of a tensor in another order; its gradient is the inverse permutation, without atomic additions."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return tensor.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(gradients[0], inverse, order), None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, kernel: Callable[..., Any], scale: float | None = None
) -> Tensor:
    """Self-attention [B, S, H, D] in which real tokens see the real tokens of their row, and padding sees padding.

    kernel: has the signature of flash_attn_varlen_func.
    """
    rows = query.shape[0]
    tokens = (tensor.flatten(0, 1) for tensor in (query, key, value))
    packed = [_Permute.apply(tensor, packing.order, packing.places) for tensor in tokens]
    bounds, longest = packing.bounds, packing.longest
    out = kernel(*packed, bounds, bounds, longest, longest, softmax_scale=scale, causal=False)
    out = out[0] if isinstance(out, tuple) else out  # some releases of flash-attn 3 return the softmax's sums, too
    return _Permute.apply(out, packing.places, packing.order).unflatten(0, (rows, -1))


class given:
    """Within the context the blocks' packing is this one, made once for all of them; None: each makes its own."""

    def __init__(self, packing: Packing | None) -> None:
        self._packing = packing

    def __enter__(self) -> None:
        global _given
        _given = self._packing

    def __exit__(self, *_: object) -> None:
        global _given
        _given = None


def _dispatch(name: str) -> Callable[..., Tensor]:
    """The kernel as diffusers' dispatch calls a backend."""

    def backend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        if is_causal or dropout_p or query.shape[1] != key.shape[1]:
            raise NotImplementedError("flash attention here is self-attention without dropout or causal mask")
        packing = _given
        if packing is None:
            packing = pack(_token_mask(attn_mask, query))
        device = query.device.type
        # Autocast covers PyTorch's attention, not kernels that it does not know.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        return attend(query, key, value, packing, _loaded[name], scale)

    return backend


def _token_mask(mask: Tensor | None, query: Tensor) -> Tensor:
    """[B, S] of a mask of keys as diffusers writes it: [B, S] or [B, 1, 1, S]."""
    rows, length = query.shape[:2]
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=query.device)
    if mask.dtype != torch.bool or mask.shape not in ((rows, length), (rows, 1, 1, length)):
        raise NotImplementedError(
            f"flash attention takes a mask of keys, [{rows}, {length}] bool, and got {tuple(mask.shape)} {mask.dtype}; "
            "set model.attention=native"
        )
    return mask.reshape(rows, length)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# In place of diffusers' own, whose sequences are wrong (see above). Names are an enumeration: new ones cannot be added.
for _name in _KERNELS:
    _AttentionBackendRegistry.register(_DISPATCHED[_name])(_dispatch(_name))
