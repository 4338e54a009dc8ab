"""Precomputed shards: made on any number of ranks, equal to encoding on the fly, trained on without encoders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import webdataset

from configs import load
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
from data.pack import main as pack_main
from data.verify import verify
from models import tiny
from models.tiny_pipelines.prompts import CAPTIONS
from tests.data.pictures import body, contents, picture
from tests.ranks import run_ranks
from tests.trainer.precomputing import PACK, SMOKE, settings, train_here, write_pictures
from trainer import precompute
from trainer.build import latent_encoder, text_encoder
from trainer.encoding import Encoding
from trainer.engines.distributed import World
from trainer.training_data import check_contents, read_data, stored_null

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, the pictures packed as they are (plain) and precomputed (made)."""
    path = tmp_path_factory.mktemp("precompute")
    tiny.write(path / "model", "pipeline", seed=0)
    write_pictures(path / "pictures", 16)
    assert pack_main([str(path / "pictures"), str(path / "plain"), *PACK]) == 0
    assert precompute.main(command(path, "pictures", "made")) == 0
    return path


def command(path: Path, source: str, dest: str, *more: str) -> list[str]:
    config = path / "config.yaml"
    config.write_text(f"run: {{name: x}}\nmodel: {{path: {path / 'model'}}}\n")
    train = ("--set", "train.steps=1", "--set", "train.global_batch_size=1", "--set", "train.micro_batch_size=1")
    return [str(path / source), str(path / dest), "--precompute", str(config), *train, *PACK, *more]


def batches(folder: Path, size: int = 8) -> list[Any]:
    manifest = read_manifest(str(folder))
    order = Order(manifest, seed=0, global_batch_size=size)
    return list(Loader(order, manifest, steps=order.steps_through(0)))


def encoding(folder: Path, manifest: Path, needs_null: bool = True, **more: Any) -> Encoding:
    config = load.load([SMOKE], settings(folder / "model", manifest, folder / "run", **more))
    return Encoding(
        lambda: text_encoder(config, CPU),
        lambda: latent_encoder(config, CPU),
        CPU,
        needs_null,
        lambda bucket: (4, bucket[0] // 8, bucket[1] // 8),
        stored_null(config, read_manifest(str(manifest))),
    )


def rows(encoding: Encoding, folder: Path, size: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """By key: latents, embeddings and mask of the condition and of the null condition, references of both."""
    found = {}
    for batch in batches(folder, size):
        x, cond, null = encoding.encode(batch)
        assert null is not None and x.dtype == cond.embeds.dtype == null.embeds.dtype == torch.float32
        parts = (x, cond.embeds, cond.mask, null.embeds, null.mask, *cond.references, *null.references)
        found |= {key: tuple(part[row] for part in parts) for row, key in enumerate(batch.keys)}
    return found


def same(a: dict[str, tuple[torch.Tensor, ...]], b: dict[str, tuple[torch.Tensor, ...]]) -> bool:
    return a.keys() == b.keys() and all(
        len(a[key]) == len(b[key]) and all(map(torch.equal, a[key], b[key])) for key in a
    )


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("an encoder was loaded")


def test_precomputed_rows_are_those_encoded_on_the_fly_bit_by_bit(folder: Path) -> None:
    fly, stored = encoding(folder, folder / "plain"), encoding(folder, folder / "made")
    stored.load_text = stored.load_latents = refuse
    assert all(batch.pixels is None for batch in batches(folder / "made"))
    assert len(found := rows(stored, folder / "made", 8)) == 16 and same(rows(fly, folder / "plain", 8), found)


def precompute_here(arguments: list[str]) -> int:
    import argparse

    given: argparse.Namespace = precompute.parser().parse_args(arguments)
    config = precompute.config_of(given)
    return precompute.precompute(config, given, World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), CPU))


@pytest.mark.slow
def test_any_number_of_ranks_writes_the_same_bytes_and_goes_on_where_it_was_killed(folder: Path) -> None:
    before = contents(folder / "made")
    assert sum(name.endswith(".tar") for name in before) >= 3
    shutil.copytree(folder / "made", folder / "again")
    for name in ("manifest.json", "null.npy"):
        (folder / "again" / name).unlink()
    kept, *lost = sorted(name for name in before if name.endswith(".idx"))
    for name in lost:  # a shard without its index is not finished
        (folder / "again" / name).unlink()
    stamp = (folder / "again" / kept.replace(".idx", ".tar")).stat().st_mtime_ns
    arguments = command(folder, "pictures", "again", "--name", "pictures")
    assert run_ranks(precompute_here, 2, arguments, timeout=120) == [0, 0]
    assert contents(folder / "again") == before
    assert (folder / "again" / kept.replace(".idx", ".tar")).stat().st_mtime_ns == stamp, "a finished shard was remade"


def test_plain_webdataset_reads_the_arrays(folder: Path) -> None:
    manifest = read_manifest(str(folder / "made"))
    (first, *_) = webdataset.WebDataset(str(folder / "made" / manifest.shards[0].name), shardshuffle=False).decode()
    assert first["latent.npy"].shape == (4, 4, 4) and first["latent.npy"].dtype == np.float32
    assert first["text.npy"].shape == (len(first["mask.npy"]), 16) and first["mask.npy"].all()
    assert verify(str(folder / "made")) == (16, [])


def test_every_caption_is_encoded_and_drawn_with_its_own_embedding(folder: Path) -> None:
    write_pictures(folder / "several", 8, several=True)
    assert precompute.main(command(folder, "several", "drawn", "--dtype", "bfloat16")) == 0
    manifest = read_manifest(str(folder / "drawn"))
    assert manifest.encoded is not None and manifest.encoded.dtype == "bfloat16"
    order = Order(manifest, seed=0, global_batch_size=8)
    fly, stored = encoding(folder, folder / "plain"), encoding(folder, folder / "drawn")
    captions = set()
    for batch in Loader(order, manifest, steps=4, workers=1):
        assert batch.precomputed is not None and batch.precomputed.text.embeds.dtype == torch.bfloat16
        _, cond, _ = stored.encode(batch)
        expected = fly.prompts(batch.captions)
        assert torch.equal(cond.embeds, expected.embeds.bfloat16().float())
        captions |= set(zip(batch.keys, batch.captions, strict=True))
    assert len(captions) > 12, "hardly a second caption was drawn"


def test_edits_hold_reference_latents_and_their_own_null_condition(tmp_path: Path) -> None:
    folder = tmp_path
    tiny.write(folder / "model", "edit_plus", seed=0)
    source = folder / "edits"
    source.mkdir()
    for n in range(4):
        (source / f"{n}.png").write_bytes(body(picture(32, 32, n)))
        (source / f"{n}.source.png").write_bytes(body(picture(16, 64, 50 + n)))
        (source / f"{n}.txt").write_text(CAPTIONS[n])
    wide = ("--kind", "edits", "--max-aspect", "4")
    small = ("--set", "encoder.seen_edge=64")
    assert pack_main([str(source), str(folder / "edits-plain"), *PACK, *wide]) == 0
    assert precompute.main(command(folder, "edits", "edits-made", *wide, *small)) == 0
    fly, stored = (encoding(folder, folder / name, encoder__seen_edge=64) for name in ("edits-plain", "edits-made"))
    stored.load_text = stored.load_latents = refuse
    found = rows(stored, folder / "edits-made", 4)
    expected = rows(fly, folder / "edits-plain", 4)
    assert len(found) == 4 and found.keys() == expected.keys()
    for key, parts in expected.items():
        for made, wanted in zip(found[key], parts, strict=True):
            torch.testing.assert_close(made, wanted, rtol=0, atol=2e-6)  # the image tower's threads share out its rows
    (batch,) = batches(folder / "edits-plain", 4)
    height, width = (side // 8 for side in batch.source_pixels.shape[2:])
    references = [parts[5:] for parts in found.values()]
    for own, of_null in references:
        assert own.shape == (4, height, width) == (4, 2, 8) and torch.equal(own, of_null), (
            "guided or not, a row keeps its image"
        )
    assert len({own.sum().item() for own, _ in references}) == 4
    assert verify(str(folder / "edits-made")) == (4, [])


def test_captions_alone_become_zeros_of_the_latent_shape(folder: Path) -> None:
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    prompts = str(folder / "prompts.txt")
    assert pack_main([prompts, str(folder / "prompts"), *PACK, "--kind", "captions"]) == 0
    assert precompute.main(command(folder, "prompts.txt", "prompts-made", "--kind", "captions")) == 0
    fly, stored = encoding(folder, folder / "prompts"), encoding(folder, folder / "prompts-made")
    fly.load_latents = stored.load_latents = stored.load_text = refuse
    found = rows(stored, folder / "prompts-made", 5)
    assert len(found) == 10 and same(rows(fly, folder / "prompts", 5), found)
    assert all(parts[0].shape == (4, 4, 4) and not parts[0].any() for parts in found.values())


def config_with(folder: Path, manifest: str, **more: Any) -> Any:
    return load.load([SMOKE], settings(folder / "model", folder / manifest, folder / "run", **more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"encoder__null_prompt": "nothing"}, r"encoder\.null_prompt 'Generate an image.' there, 'nothing' here"),
        ({"encoder__max_text_tokens": 8}, r"encoder\.max_text_tokens 512 there, 8 here"),
        ({"model__latents": "pixels"}, r"model\.latents 'vae' there, 'pixels' here; VAE"),
    ],
)
def test_other_encoders_are_refused_by_name(folder: Path, more: dict[str, Any], message: str) -> None:
    config = config_with(folder, "made", **more)
    with pytest.raises(ValueError, match=rf"made was precomputed with other encoders .*{message}.*pack it again"):
        check_contents(config, read_data(config))


def test_latents_drawn_in_every_step_are_refused_where_they_are_stored(folder: Path) -> None:
    config = config_with(folder, "made", encoder__latents="sample")
    with pytest.raises(ValueError, match=r"set encoder\.latents=mean, or train on images"):
        check_contents(config, read_data(config))


def test_drawn_latents_are_a_function_of_step_and_row(folder: Path) -> None:
    mean = encoding(folder, folder / "plain", needs_null=False)
    drawn = encoding(folder, folder / "plain", needs_null=False, encoder__latents="sample")
    first, second = batches(folder / "plain", 4)[:2]
    x, _, _ = drawn.encode(first)
    assert torch.equal(drawn.encode(first)[0], x)
    assert (x - mean.encode(first)[0]).abs().max() > 1e-2
    half = replace(first, rows=first.rows[2:], pixels=first.pixels[2:], captions=first.captions[2:])
    torch.testing.assert_close(drawn.encode(half)[0], x[2:], rtol=0, atol=1e-5)
    again = replace(first, step=second.step)
    assert (drawn.encode(again)[0] - x).abs().max() > 1e-2


def test_other_weights_of_the_same_encoder_are_refused(folder: Path, tmp_path: Path) -> None:
    tiny.write(tmp_path / "model", "pipeline", seed=1)
    config = config_with(folder, "made", model__path=tmp_path / "model")
    with pytest.raises(ValueError, match=r"text encoder '\w+\.*'? there, .*VAE .* there"):
        check_contents(config, read_data(config))


def test_mirroring_precomputed_latents_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.flip mirrors images, but .*set data\.flip=false"):
        read_data(config_with(folder, "made", data__flip="true"))


@pytest.mark.slow
def test_training_on_precomputed_shards_loads_no_encoder_and_has_the_same_losses(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"  # a model folder without encoders: loading one would fail
    shutil.copytree(folder / "model", bare, ignore=shutil.ignore_patterns("text_encoder", "vae", "tokenizer"))
    (bare / "vae").mkdir()
    shutil.copy(folder / "model/vae/config.json", bare / "vae")  # says how large latents are
    whole = ("--shard-mb", "100")  # one shard each: the order follows from the shards
    assert pack_main([str(folder / "pictures"), str(folder / "plain-1"), *PACK, *whole]) == 0
    assert precompute.main(command(folder, "pictures", "made-1", *whole)) == 0
    fly = settings(folder / "model", folder / "plain-1", tmp_path / "fly/run")
    stored = settings(bare, folder / "made-1", tmp_path / "stored/run")
    results = [run_ranks(train_here, 1, overrides, timeout=200)[0] for overrides in (fly, stored)]
    assert [code for code, _, _ in results] == [0, 0], results
    assert len(results[0][1]) == 3 and results[0][1] == results[1][1]


@pytest.mark.slow
def test_data_free_training_needs_an_image_free_objective(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    assert pack_main([str(tmp_path / "prompts.txt"), str(tmp_path / "set"), *PACK, "--kind", "captions"]) == 0
    refused = settings(folder / "model", tmp_path / "set", tmp_path / "refused/run")
    code, _, message = run_ranks(train_here, 1, refused, timeout=200)[0]
    assert code == 1 and "holds captions alone" in message and "objective.image_free=true" in message
    held_out = {"data__held_out": tmp_path / "set", "objective__image_free": "true"}
    trained = settings(folder / "model", tmp_path / "set", tmp_path / "free/run", **held_out)
    code, losses, message = run_ranks(train_here, 1, trained, timeout=200)[0]
    assert code == 0 and len(losses) == 3 and all(np.isfinite(losses)), message


def test_a_manifest_says_what_made_its_arrays(folder: Path) -> None:
    encoded = json.loads((folder / "made/manifest.json").read_text())["encoded"]
    assert (encoded["latent_channels"], encoded["pixels_per_latent"], encoded["text_width"]) == (4, 8, 16)
    assert (encoded["dtype"], encoded["latent_kind"], encoded["null_prompt"]) == (
        "float32",
        "vae",
        "Generate an image.",
    )
    assert len(encoded["text"]) == len(encoded["latents"]) == 64
