"""Flash attention with variable length: packing, padding, gradients, and the choice of a kernel.

The kernel itself needs a GPU; here a reference with its signature stands in.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models import attention
from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage
from tests.models.conftest import Rows
from tests.models.varlen import reference
from trainer.engines.autocast import compute_in_bfloat16
from trainer.engines.recompute import checkpoint_blocks
from trainer.engines.sharding import Layout, device_mesh, shard

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MASK = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn is installed: the reference."""
    install(monkeypatch, reference)


def install(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]) -> None:
    """As packages that Python imports: how the kernel is found is part of what compiles."""
    for name in ("flash_attn", "flash_attn_interface"):
        package: Any = types.ModuleType(name)
        package.flash_attn_varlen_func = kernel
        monkeypatch.setitem(sys.modules, name, package)
    for name in ("flash", "flash3"):
        monkeypatch.delitem(attention._loaded, name, raising=False)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_packing_puts_real_tokens_first_and_back() -> None:
    packing = attention.pack(MASK)
    assert packing.bounds.tolist() == [0, 4, 6, 10, 12, 18, 18, 20, 24]
    assert packing.longest == 6
    assert packing.order[:6].tolist() == [0, 1, 4, 5, 2, 3]
    assert torch.equal(packing.order[packing.places], torch.arange(24))
    begins, ends = packing.bounds[:-1:2].tolist(), packing.bounds[1::2].tolist()
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        assert packing.order[begin:end].tolist() == [6 * row + int(i) for i in MASK[row].nonzero()]


def test_nothing_about_packing_depends_on_values() -> None:
    """On meta there are none: a host sync or a shape that follows the mask would raise."""
    packing = attention.pack(MASK.to("meta"))
    assert [tensor.shape[0] for tensor in packing[:3]] == [24, 24, 9]


def test_it_is_masked_attention_and_so_are_its_gradients() -> None:
    inputs = [(draw(4, 6, 2, 8) * scale).requires_grad_() for scale in (1.0, 0.7, -1.0)]
    grad = draw(4, 6, 2, 8) * MASK[..., None, None]
    packed = attention.attend(inputs[0], inputs[1], inputs[2], attention.pack(MASK), reference)
    heads_first = [tensor.transpose(1, 2) for tensor in inputs]
    plain = scaled_dot_product_attention(*heads_first, attn_mask=MASK[:, None, None]).transpose(1, 2)
    torch.testing.assert_close(packed[MASK], plain[MASK], rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(packed, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("junk", [float("nan"), 1e30])
def test_padding_leaks_neither_forwards_nor_backwards(junk: float) -> None:
    def run(padding: float) -> list[Tensor]:
        inputs = [draw(4, 6, 2, 8).masked_fill(~MASK[..., None, None], padding).requires_grad_() for _ in range(3)]
        out = attention.attend(inputs[0], inputs[1], inputs[2], attention.pack(MASK), reference)
        grads = torch.autograd.grad(out, inputs, draw(4, 6, 2, 8) * MASK[..., None, None])
        return [tensor[MASK] for tensor in (out, *grads)]

    for clean, dirty in zip(run(0.0), run(junk), strict=True):
        assert torch.equal(clean, dirty)


def loaded(backbone: QwenImage, name: str) -> QwenImage:
    """A float64 copy, so that what differs is no rounding, with its choice of kernel."""
    model = copy.deepcopy(backbone).double()
    attention.use(model, name)
    model._packs = name != "native"
    for idle in model.idle_parameters():
        model.get_parameter(idle).requires_grad_(False)
    return model


def pass_and_gradients(model: QwenImage, rows: Rows) -> list[Tensor]:
    x_t, t, r, cond = rows
    velocity = model(x_t.double(), t.double(), r.double(), cond.to("cpu", torch.float64))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [velocity.detach(), *torch.autograd.grad(velocity.square().sum(), trained)]


@pytest.mark.parametrize("name", ["flash", "flash3"])
def test_backbone_with_flash_equals_native(backbone: QwenImage, rows: Rows, name: str) -> None:
    native, flash = (pass_and_gradients(loaded(backbone, kind), rows) for kind in ("native", name))
    assert len(native) > 70
    for a, b in zip(flash, native, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("how", ["checkpointing", "grouped", "compile"])
def test_flash_under_recomputation_and_compilation(
    backbone: QwenImage, rows: Rows, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pass_and_gradients(loaded(backbone, "flash"), rows)
    model = loaded(backbone, "flash")
    if how == "compile":
        for block in model.transformer_blocks:
            block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    else:
        checkpoint_blocks(model, every=1, group=1 if how == "checkpointing" else 2, keep="nothing")
    made, pack = list[tuple[int, ...]](), attention.pack

    def counted(mask: Tensor) -> attention.Packing:
        made.append(tuple(mask.shape))
        return pack(mask)

    monkeypatch.setattr(attention, "pack", counted)
    for a, b in zip(pass_and_gradients(model, rows), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * (1 + float(b.abs().max())))
    assert made == [(3, 5 + 12)]  # once a pass, in the backward pass not again


@pytest.mark.parametrize("engine", ["sharded", "autocast"])
def test_flash_computes_in_the_blocks_dtype(
    backbone: QwenImage, rows: Rows, engine: str, monkeypatch: pytest.MonkeyPatch, one_rank: None
) -> None:
    """As FSDP2 and as ZeRO run the blocks; the kernel knows no float32."""
    x_t, t, r, cond = rows
    expected = backbone(x_t, t, r, cond).detach()
    seen = set[torch.dtype]()

    def kernel(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> Tensor:
        seen.update(tensor.dtype for tensor in (q, k, v))
        return reference(q, k, v, *lengths, **options)

    install(monkeypatch, kernel)
    attention.use(backbone, "flash")
    backbone._packs = True
    if engine == "sharded":
        shard(backbone, Layout(device_mesh(CPU), block_dtype="bfloat16"))
    else:
        compute_in_bfloat16(backbone, "cpu")
    velocity = backbone(x_t, t, r, cond)
    velocity.square().sum().backward()
    assert seen == {torch.bfloat16}
    torch.testing.assert_close(velocity, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["native", "flash"])
@torch.no_grad()
def test_padding_content_changes_nothing(backbone: QwenImage, rows: Rows, name: str) -> None:
    x_t, t, r, cond = rows
    model = loaded(backbone, name).float()
    clean = model(x_t, t, r, cond)
    for junk in (float("nan"), 1e30):
        dirty = Conditioning(cond.embeds.masked_fill(~cond.mask[..., None], junk), cond.mask)
        assert torch.equal(model(x_t, t, r, dirty), clean)


def test_a_dispatched_mask_needs_no_packing_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Z-Image calls it: the mask of keys comes by diffusers' dispatch."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    monkeypatch.setitem(attention._loaded, "flash", reference)
    inputs = [draw(4, 6, 2, 8) for _ in range(3)]
    backend = AttentionBackendName.FLASH_VARLEN
    expected = attention.attend(inputs[0], inputs[1], inputs[2], attention.pack(MASK), reference)
    assert torch.equal(dispatch_attention_fn(*inputs, attn_mask=MASK[:, None, None], backend=backend), expected)
    whole = attention.attend(inputs[0], inputs[1], inputs[2], attention.pack(torch.ones_like(MASK)), reference)
    assert torch.equal(dispatch_attention_fn(*inputs, backend=backend), whole)
    with pytest.raises(NotImplementedError, match=r"model\.attention=native"):
        dispatch_attention_fn(*inputs, attn_mask=torch.ones(4, 2, 6, 6, dtype=torch.bool), backend=backend)


def test_autocast_reaches_the_kernel() -> None:
    seen = []
    inputs = [draw(4, 6, 2, 8).float() for _ in range(3)]
    packing = attention.pack(MASK)

    def kernel(q: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(q.dtype)
        return reference(q, *args, **options)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16), attention.given(packing):
        patch.setitem(attention._loaded, "flash", kernel)
        attention._dispatch("flash")(*inputs)
    assert seen == [torch.bfloat16]


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("capability", "chosen"), [((9, 0), "flash3"), ((8, 0), "flash"), ((10, 0), "flash"), ((7, 5), "native")]
)
def test_auto_takes_the_fastest_that_runs(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    gpu(monkeypatch, capability)
    choice = attention.choose("auto", CUDA, torch.bfloat16, 128)
    assert choice.name == chosen
    assert ("compute capability" in choice.why) == (chosen == "native")


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))

    def broken(name: str) -> types.ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(attention, "load_kernel", broken)
    choice = attention.choose("auto", CUDA, torch.bfloat16, 128)
    assert choice.name == "native"
    assert "flash-attn cannot be loaded (undefined symbol: _ZN3c10)" in choice.why
    assert "set engine.block_dtype=bfloat16" in attention.choose("auto", CUDA, torch.float32, 128).why
    assert "this is cpu" in attention.choose("auto", CPU, torch.bfloat16, 128).why


@pytest.mark.parametrize(
    ("name", "device", "dtype", "width", "remedy"),
    [
        ("flash", CPU, torch.bfloat16, 128, "model.attention=native"),
        ("flash3", CUDA, torch.float32, 128, "engine.block_dtype=bfloat16"),
        ("flash", CUDA, torch.bfloat16, 288, "wider than 256"),
        ("flash3", CUDA, torch.bfloat16, 128, "compute capability 9.x and this is 8.6"),
        ("xformers", CUDA, torch.bfloat16, 128, "choose auto, native, flash3 or flash"),
    ],
)
def test_what_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, device: torch.device, dtype: torch.dtype, width: int, remedy: str
) -> None:
    gpu(monkeypatch, (8, 6))
    with pytest.raises(ValueError, match=r"model\.attention") as caught:
        attention.choose(name, device, dtype, width)
    assert remedy in str(caught.value)


def test_a_model_outside_the_dispatch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear calls PyTorch's attention itself; set model\.attention=native"):
        attention.use(nn.Linear(2, 2), "flash")
    attention.use(nn.Linear(2, 2), "native")
