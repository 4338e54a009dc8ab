"""8-bit moments: near AdamW's, float32 in a checkpoint, and the same bytes after a resume. Needs bitsandbytes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from configs.schema import Optimizer
from trainer.engines import optim

OPTIONS = Optimizer(name="adamw8bit", learning_rate=0.01, betas=(0.9, 0.99), weight_decay=0.1)
FINITE = torch.tensor(True)


def _leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Quantised; too small for it; nothing of a parameter on this rank.
    return [torch.randn(n, generator=generator).requires_grad_() for n in (5000, 7, 0)]


def _train(leaves: list[Tensor], options: Optimizer, steps: int) -> torch.optim.Optimizer:
    optimizer = optim.build_optimizer(options, leaves)
    for _ in range(steps):
        _step(optimizer, leaves)
    return optimizer


def _step(optimizer: torch.optim.Optimizer, leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = torch.sin(leaf.detach() * 3)
    optim.apply_update(optimizer, 0.01, FINITE)


def test_updates_are_near_those_of_adamw() -> None:
    pytest.importorskip("bitsandbytes")
    ours, exact, before = _leaves(), _leaves(), _leaves()
    _train(ours, OPTIONS, 4)
    _train(exact, Optimizer(name="adamw", betas=(0.9, 0.99), weight_decay=0.1), 4)
    moved = (exact[0] - before[0]).norm()
    assert 0 < (ours[0] - exact[0]).norm() < 0.1 * moved
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    pytest.importorskip("bitsandbytes")
    leaves = _leaves()
    optimizer = _train(leaves, OPTIONS, 3)
    moments = optim.moments(OPTIONS, optimizer)
    saved = [{name: tensor.clone() for name, tensor in moments.of(leaf).items()} for leaf in leaves]
    assert all(
        t.dtype == torch.float32 and t.shape == leaf.shape
        for leaf, s in zip(leaves, saved, strict=True)
        for t in s.values()
    )
    assert moments.step == 3

    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    fresh = optim.build_optimizer(OPTIONS, again)
    resumed = optim.moments(OPTIONS, fresh)
    for leaf, stored in zip(again, saved, strict=True):
        for name, tensor in resumed.of(leaf).items():
            tensor.copy_(stored[name])
    resumed.loaded(3.0)
    assert resumed.step == 3
    for leaf, other in zip(leaves, again, strict=True):
        for name, tensor in resumed.of(other).items():
            assert torch.equal(tensor, moments.of(leaf)[name])
    _step(optimizer, leaves)
    _step(fresh, again)
    assert all(torch.equal(a, b) for a, b in zip(leaves, again, strict=True))


def test_without_bitsandbytes_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ModuleNotFoundError, match=r"extra \[gpu\], or set optimizer\.name=adamw"):
        optim.build_optimizer(OPTIONS, _leaves())


def test_shards_on_the_cpu_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"lie on the cpu: set optimizer\.name=adamw"):
        optim.refuse(OPTIONS, torch.device("cpu"))
    optim.refuse(OPTIONS, torch.device("cuda", 0))
    optim.refuse(Optimizer(name="adamw"), torch.device("cpu"))
