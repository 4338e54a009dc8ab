"""Captions that are drawn, captions alone, editing triples: packed, indexed, verified and read."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from data.batch import Batch
from data.contents import Draw
from data.index_cli import main as index_main
from data.loader import Loader
from data.manifest import Manifest, read_manifest
from data.order import Order
from data.pack import main
from data.s3 import DataError
from data.verify import verify
from tests.data.pictures import SMALL, body, picture
from tests.data.sets import write_tar

HERE = ("--workers", "0")
SQUARE = ("--resolution", "16", "--bucket-step", "8", "--min-bucket", "4")


def read(folder: Path, steps: int | None = None, size: int = 4, seed: int = 0, **options: object) -> list[Batch]:
    manifest = read_manifest(str(folder))
    order = Order(manifest, seed=seed, global_batch_size=size)
    return list(Loader(order, manifest, steps=steps or order.steps_through(0), **options))


def many_captions(folder: Path, count: int = 12) -> Path:
    """Pictures with three captions each, in a table."""
    folder.mkdir()
    rows = []
    for n in range(count):
        (folder / f"{n}.png").write_bytes(body(picture(16, 16, n)))
        rows.append({"file_name": f"{n}.png", "captions": [f"{n} short", f"{n} long", f"{n} tags"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drawn(batches: list[Batch]) -> dict[tuple[int, str], str]:
    """Caption by (own epoch, key)."""
    return {
        (own, key): caption
        for batch in batches
        for own, key, caption in zip(batch.own_epochs, batch.keys, batch.captions, strict=True)
    }


def test_one_of_several_captions_is_drawn_in_every_own_epoch(tmp_path: Path) -> None:
    dest = tmp_path / "packed"
    assert main([str(many_captions(tmp_path / "set")), str(dest), *SQUARE, *HERE]) == 0
    found = drawn(read(dest, steps=90))  # 30 own epochs
    assert len(found) == 12 * 30
    counts = Counter(caption.split()[1] for caption in found.values())
    assert counts.keys() == {"short", "long", "tags"} and min(counts.values()) > 80, "of 120 each"
    sequences = [tuple(found[own, key].split()[1] for own in range(30)) for key in {key for _, key in found}]
    assert len(set(sequences)) == 12, "samples draw alike"
    assert all(len({caption.split()[0] for (_, k), caption in found.items() if k == key}) == 1 for _, key in found)
    assert drawn(read(dest, steps=90, seed=1)) != found, "the seed changes nothing"


def test_the_drawn_caption_is_the_same_at_any_world_size_and_after_resume(tmp_path: Path) -> None:
    dest = tmp_path / "packed"
    assert main([str(many_captions(tmp_path / "set")), str(dest), *SQUARE, *HERE]) == 0
    whole = drawn(read(dest, steps=9))
    ranks = [drawn(read(dest, steps=9, rank=rank, world_size=2)) for rank in range(2)]
    assert ranks[0] | ranks[1] == whole and not ranks[0].keys() & ranks[1].keys()
    assert drawn(read(dest, steps=9, start_step=5)).items() <= whole.items()


def test_images_are_mirrored_in_half_of_their_own_epochs_only_when_asked(tmp_path: Path) -> None:
    dest = tmp_path / "packed"
    assert main([str(many_captions(tmp_path / "set")), str(dest), *SQUARE, *HERE]) == 0
    plain, flipped = read(dest, steps=60), read(dest, steps=60, flip=True)
    mirrored = 0
    for a, b in zip(plain, flipped, strict=True):
        assert a.pixels is not None and b.pixels is not None
        for x, y in zip(a.pixels, b.pixels, strict=True):
            same, turned = torch.equal(x, y), torch.equal(x.flip(-1), y)
            assert same != turned
            mirrored += turned
    assert 90 < mirrored < 150, "of 240"
    again = read(dest, steps=60, flip=True, start_step=30)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(flipped[30:], again, strict=True))


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    numbers = [Draw(3, own).choose("caption", f"set/{key}", 4) for own in range(40) for key in range(50)]
    assert all(abs(count - 500) < 80 for count in Counter(numbers).values())
    flips = [Draw(3, own).choose("flip", f"set/{key}", 4) for own in range(40) for key in range(50)]
    assert abs(np.corrcoef(numbers, flips)[0, 1]) < 0.1


@pytest.mark.parametrize("layout", ["lines", "folder", "table", "tar"])
def test_captions_alone_are_packed_and_read_without_pixels(tmp_path: Path, layout: str) -> None:
    texts = [f"prompt {n}" for n in range(10)]
    source = tmp_path / "prompts"
    if layout == "lines":
        source = source.with_suffix(".txt")
        source.write_text("\n".join([*texts, "  ", ""]))
    elif layout == "tar":
        source = write_tar(tmp_path / "prompts.tar", {f"{n}.txt": text.encode() for n, text in enumerate(texts)})
    else:
        source.mkdir()
        for n, text in enumerate(texts):
            (source / f"{n}.txt").write_text(text) if layout == "folder" else None
        if layout == "table":
            (source / "metadata.csv").write_text("caption\n" + "\n".join(texts))
    dest = tmp_path / "packed"
    assert main([str(source), str(dest), "--kind", "captions", "--resolution", "128", *HERE]) == 0
    manifest = read_manifest(str(dest))
    assert manifest.kind == "captions" and {tuple(shard.bucket) for shard in manifest.shards} == {(128, 128)}
    batches = read(dest, size=5)
    assert Counter(caption for batch in batches for caption in batch.captions) == Counter(texts)
    assert all(batch.pixels is None and not batch.has_targets and batch.bucket == (128, 128) for batch in batches)
    assert verify(str(dest)) == (10, [])
    plain = webdataset.WebDataset(str(dest / manifest.shards[0].name), shardshuffle=False).decode()
    assert {sample["txt"] for sample in plain} == set(texts)


def edits(folder: Path, count: int, layout: str) -> Path:
    """Triples whose source is a grey version of another shape than the target."""
    folder.mkdir()
    rows = []
    for n in range(count):
        (folder / f"{n}.png").write_bytes(body(picture(32, 32, n)))
        source = f"{n}.source.png" if layout == "files" else f"before/{n}.png"
        (folder / source).parent.mkdir(exist_ok=True)
        (folder / source).write_bytes(body(picture(24 if n % 2 else 40, 40 if n % 2 else 24, 100 + n)))
        rows.append({"file_name": f"{n}.png", "source": source, "instruction": f"edit {n}"})
        if layout == "files":
            (folder / f"{n}.txt").write_text(f"edit {n}")
    if layout == "table":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("layout", ["files", "table"])
def test_edits_are_bucketed_by_target_and_source_size(tmp_path: Path, layout: str) -> None:
    dest = tmp_path / "packed"
    source = edits(tmp_path / "set", 16, layout)
    assert main([str(source), str(dest), "--kind", "edits", *SMALL, *HERE, "--format", "png"]) == 0
    manifest = read_manifest(str(dest))
    names = {stream.name: stream.total for stream in manifest.streams()}
    assert names == {"set/32x32-from-24x40": 8, "set/32x32-from-40x24": 8}
    seen = set()
    for batch in read(dest):
        assert batch.pixels is not None and batch.source_pixels is not None
        assert batch.pixels.shape == (4, 3, 32, 32)
        for row, caption in enumerate(batch.captions):
            n = int(caption.split()[1])
            seen.add(n)
            assert tuple(batch.source_pixels.shape[2:]) == ((24, 40) if n % 2 else (40, 24))
            for found, image in (
                (batch.pixels[row], picture(32, 32, n)),
                (batch.source_pixels[row], picture(24 if n % 2 else 40, 40 if n % 2 else 24, 100 + n)),
            ):
                expected = np.moveaxis(np.asarray(image, dtype=np.float32), -1, 0) / 127.5 - 1
                assert np.abs(found.numpy() - expected).max() < 1e-6
    assert seen == set(range(16))
    assert verify(str(dest)) == (16, [])


def test_an_edit_without_its_source_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = edits(tmp_path / "set", 9, "files")
    (source / "3.source.png").unlink()
    assert main([str(source), str(tmp_path / "packed"), "--kind", "edits", *SMALL, *HERE]) == 0
    assert "packed 8 edits; left out: 1 no source image" in capsys.readouterr().out


def test_target_and_source_are_mirrored_together(tmp_path: Path) -> None:
    dest = tmp_path / "packed"
    assert main([str(edits(tmp_path / "set", 8, "files")), str(dest), "--kind", "edits", *SMALL, *HERE]) == 0
    turned = 0
    for a, b in zip(read(dest, steps=20), read(dest, steps=20, flip=True), strict=True):
        assert a.pixels is not None and a.source_pixels is not None
        assert b.pixels is not None and b.source_pixels is not None
        for row in range(len(a)):
            target = torch.equal(a.pixels[row].flip(-1), b.pixels[row])
            assert target == torch.equal(a.source_pixels[row].flip(-1), b.source_pixels[row])
            turned += target
    assert 20 < turned < 60


def test_plain_tars_of_edits_and_captions_are_indexed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pairs", "texts"):
        (tmp_path / name).mkdir()
    with webdataset.TarWriter(str(tmp_path / "pairs" / "x.tar")) as writer:
        for n in range(6):
            images = {"png": picture(16, 16, n), "source.png": picture(24, 16, n)}
            writer.write({"__key__": str(n), **images, "txt": f"edit {n}"})
    with webdataset.TarWriter(str(tmp_path / "texts" / "x.tar")) as writer:
        for n in range(6):
            writer.write({"__key__": str(n), "json": {"captions": [f"a {n}", f"b {n}"]}})
    assert index_main([str(tmp_path / "pairs"), "--kind", "edits", *HERE]) == 0
    assert "16x16-from-24x16" in read_manifest(str(tmp_path / "pairs")).streams()[0].name
    (batch,) = read(tmp_path / "pairs", size=6)
    assert batch.source_pixels is not None and batch.source_pixels.shape == (6, 3, 24, 16)
    assert index_main([str(tmp_path / "texts"), "--kind", "captions", "--resolution", "64", *HERE]) == 0
    found = drawn(read(tmp_path / "texts", steps=20, size=6))
    assert {caption[0] for caption in found.values()} == {"a", "b"}
    # A second call with another kind makes the indexes again instead of mixing the two.
    assert index_main([str(tmp_path / "pairs"), *HERE]) == 0
    assert read_manifest(str(tmp_path / "pairs")).kind == "images"


def test_sets_of_different_kinds_are_not_mixed(tmp_path: Path) -> None:
    main([str(edits(tmp_path / "edits", 8, "files")), str(tmp_path / "a"), "--kind", "edits", *SMALL, *HERE])
    main([str(many_captions(tmp_path / "images")), str(tmp_path / "b"), *SQUARE, *HERE])
    parts = [(read_manifest(str(tmp_path / name)), Fraction(1)) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"hold different things .*edits: edits.*images: images.*pack them alike"):
        Manifest.mix(parts)


def test_a_manifest_with_another_kind_or_sizes_is_refused(tmp_path: Path) -> None:
    main([str(many_captions(tmp_path / "images")), str(tmp_path / "set"), *SQUARE, *HERE])
    path = tmp_path / "set" / "manifest.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"kind": "videos"}, "holds 'videos'"),
        ({"kind": "edits"}, "source_bucket exactly if"),
        ({"encoded": {"dtype": "float32"}}, "'latent_kind' is None"),
        ({"encoded": "yes"}, "not an object"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=message):
            read_manifest(str(tmp_path / "set"))
