"""Encoders sharded over ranks give what whole ones give, with gathers that do not depend on the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from models import tiny
from models.encoders.latents import LatentEncoder
from models.encoders.text import TextEncoder
from tests.ranks import run_ranks
from trainer.engines.frozen import shard_frozen
from trainer.engines.sharding import device_mesh
from trainer.plugins import plugin

CAPTIONS = ["a handwritten one", "a handwritten two , one", "a handwritten one", "a handwritten three"]
LAYERS = 2  # of the tiny text encoder
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    assert tiny.write(path, "pipeline", seed=0)
    return path


def _encoders(folder: Path, name: str = "qwen_image") -> tuple[TextEncoder, LatentEncoder]:
    backbone = plugin("model", {"name": name, "path": str(folder)})[0]
    text = backbone.text_encoder(folder, "cpu", torch.float32, 64, "Generate an image.")
    return text, backbone.latent_encoder(folder, "vae", "cpu", torch.float32)


def _results(text: TextEncoder, latents: LatentEncoder, rows: int) -> tuple[list[torch.Tensor], list[int]]:
    """Outputs for `rows` rows, and the gathers of each of the four calls."""
    pixels = torch.rand(rows, 3, 32, 48, generator=torch.Generator().manual_seed(rows)) * 2 - 1
    found: list[Any] = []
    counts = []
    calls = (
        lambda: text.encode(CAPTIONS[:rows]).embeds,
        lambda: text.null().embeds,
        lambda: latents.encode(pixels),
        lambda: latents.decode(found[-1]),
    )
    for call in calls:
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            found.append(call())
        counts.append(sum(event.count for event in trace.key_averages() if event.key == "c10d::_allgather_base_"))
    return found, counts


def _sharded(folder: Path, replicate: int, name: str = "qwen_image") -> dict[str, Any]:
    rows = 1 + dist.get_rank() % 3  # unequal on purpose
    whole, _ = _results(*_encoders(folder, name), rows)
    text, latents = _encoders(folder, name)
    mesh = device_mesh(CPU, replicate)
    for encoder in (text, latents):
        for parts in encoder.shards():
            shard_frozen(*parts, mesh=mesh)
    first, counts = _results(text, latents, rows)
    again, _ = _results(text, latents, rows)
    held = sum(p.to_local().numel() for p in latents.vae.parameters())  # type: ignore[union-attr]
    order = latents.vae._get_fsdp_state()._comm_ctx.post_forward_order  # type: ignore[union-attr]
    equal = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, first, again, strict=True))
    total = sum(p.numel() for p in latents.vae.parameters())  # type: ignore[union-attr]
    return {"equal": equal, "counts": counts, "share": held / total, "noted": len(order)}


@pytest.mark.parametrize(("ranks", "replicate"), [(2, 1), (3, 1), (4, 2)])
def test_sharded_encoders_give_the_same_bits_with_equal_gathers(folder: Path, ranks: int, replicate: int) -> None:
    for found in run_ranks(_sharded, ranks, folder, replicate, timeout=120):
        assert found["equal"]
        # Text: every layer and the rest once. The VAE: once, however many images. The null condition is kept.
        assert found["counts"] == [LAYERS + 1, LAYERS + 1, 1, 1]
        assert found["share"] == pytest.approx(replicate / ranks, abs=0.1)
        assert found["noted"] == 0


def _edits(folder: Path) -> tuple[bool, int]:
    """Whether sharded conditions of edits are the whole encoder's, and the gathers of a call."""
    rows = 1 + dist.get_rank()  # unequal on purpose
    source = torch.rand(rows, 3, 32, 48, generator=torch.Generator().manual_seed(rows)) * 2 - 1
    found = []
    for sharded in (False, True):
        text: Any = plugin("model", {"name": "qwen_image"})[0].text_encoder(folder, "cpu", torch.float32, 64, "x")
        text.seen_edge = 64
        for parts in text.shards() if sharded else ():
            shard_frozen(*parts, mesh=device_mesh(CPU))
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            found.append(text.encode(CAPTIONS[:rows], (source,)).embeds)
        gathers = sum(event.count for event in trace.key_averages() if event.key == "c10d::_allgather_base_")
    return torch.equal(*found), gathers


def test_the_encoder_of_edits_shards_with_its_image_tower(tmp_path: Path) -> None:
    tiny.write(tmp_path / "model", "edit_plus", seed=0)
    towers = 2 + LAYERS
    assert run_ranks(_edits, 2, tmp_path / "model", timeout=120) == [(True, towers + 1)] * 2


@pytest.mark.parametrize("name", sorted(tiny.SMALLEST.keys() - {"qwen_image"}))
def test_encoders_of_every_backbone_shard(name: str, tmp_path: Path) -> None:
    tiny.write(tmp_path / "model", tiny.SMALLEST[name], seed=0)
    networks = 3 if name == "sd3" else 1
    for found in run_ranks(_sharded, 2, tmp_path / "model", 1, name, timeout=120):
        assert found["equal"]
        assert found["counts"] == [networks * (LAYERS + 1), networks * (LAYERS + 1), 1, 1]


def _trained() -> str:
    with pytest.raises(ValueError) as caught:
        shard_frozen(nn.Linear(2, 2), [], (), device_mesh(CPU))
    return str(caught.value)


def test_a_trained_module_is_refused() -> None:
    assert "only frozen modules" in run_ranks(_trained, 1)[0]
