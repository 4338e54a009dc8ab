import csv
import io
import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.buckets import Bucket
from data.images import Encoding, encode_image, image_size
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
from data.pack import main
from tests.data.pictures import SIZES, SMALL, body, contents, picture, write_folder
from tests.data.sets import write_tar

HERE = ("--workers", "0")


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def bomb(height: int, width: int) -> bytes:
    """A small PNG that says to be large."""
    plain = bytearray(body(picture(8, 8, 0)))
    plain[16:24] = struct.pack(">II", width, height)
    plain[29:33] = struct.pack(">I", zlib.crc32(plain[12:29]))
    return bytes(plain)


def left_out(folder: Path) -> dict[str, str]:
    lines = (folder / "left_out.jsonl").read_text().splitlines()
    return {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}


def test_plain_webdataset_reads_what_was_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, dest = write_folder(tmp_path / "pets", 40), tmp_path / "packed"
    assert main([str(source), str(dest), *SMALL, *HERE, "--shard-mb", "0.02"]) == 0
    assert "packed 40 images; left out: nothing" in capsys.readouterr().out
    manifest = read_manifest(str(dest))
    assert len(manifest.shards) > len(manifest.streams()) == 3
    captions, keys = Counter[str](), Counter[str]()
    for shard in manifest.shards:
        found = list(webdataset.WebDataset(str(dest / shard.name), shardshuffle=False).decode("pil"))
        assert len(found) == shard.samples
        for sample in found:
            image = sample.get("jpg") or sample["png"]
            assert (image.height, image.width) == shard.bucket
            assert sample["json"]["caption"] == sample["txt"]
            assert (source / sample["json"]["name"]).with_suffix(".txt").read_text().strip() == sample["txt"]
            captions[sample["txt"]] += 1
            keys[sample["__key__"]] += 1
    assert captions == Counter(f"picture {n}" for n in range(40))
    assert set(keys.values()) == {1}, "keys are unique in the data set, not only in a shard"
    assert not (dest / ".packing").exists()


def test_the_loader_trains_on_what_was_packed(tmp_path: Path) -> None:
    dest = tmp_path / "packed"
    assert main([str(write_folder(tmp_path / "pets", 40)), str(dest), *SMALL, *HERE]) == 0
    manifest = read_manifest(str(dest))
    order = Order(manifest, seed=0, global_batch_size=5)
    batches = list(Loader(order, manifest, steps=order.steps_through(0)))
    assert {batch.bucket for batch in batches} == {(32, 32), (24, 40), (40, 24)}
    assert len({key for batch in batches for key in batch.keys}) == 5 * len(batches) == 40
    assert all(batch.pixels.shape == (5, 3, *batch.bucket) for batch in batches)


def test_shards_have_two_to_four_thirds_of_the_asked_size(tmp_path: Path) -> None:
    dest = tmp_path / "packed"
    source = write_folder(tmp_path / "pets", 120, ((32, 32),))
    assert main([str(source), str(dest), *SMALL, *HERE, "--shard-mb", "0.05"]) == 0
    sizes = [shard.bytes for shard in read_manifest(str(dest)).shards]
    assert len(sizes) > 3
    # A tar ends with up to 10 KiB of zeros.
    assert all(2 / 3 * 50_000 <= size <= 4 / 3 * 50_000 + 10_240 for size in sizes)


def test_an_image_is_resized_and_cropped_at_its_centre() -> None:
    # Left, middle and right third of three colours: the centre crop to a square is the middle one alone.
    wide = np.zeros((60, 180, 3), np.uint8)
    wide[:, :60], wide[:, 60:120], wide[:, 120:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    suffix, encoded = encode_image(body(Image.fromarray(wide)), Bucket(30, 30), Encoding(format="png"))
    pixels = np.asarray(Image.open(io.BytesIO(encoded)))
    assert suffix == "png" and pixels.shape == (30, 30, 3)
    # At the cut the filter still sees the neighbours, as if the whole image had been resized.
    assert (pixels[:, 3:-3] == (0, 255, 0)).all()
    whole = np.asarray(Image.fromarray(wide).resize((90, 30), Image.Resampling.LANCZOS), dtype=int)
    assert np.abs(whole[:, 30:60] - pixels).max() <= 1


def test_resizing_averages_and_does_not_pick() -> None:
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    _, encoded = encode_image(body(Image.fromarray(checks).convert("RGB")), Bucket(16, 16), Encoding(format="png"))
    inner = np.asarray(Image.open(io.BytesIO(encoded)), dtype=int)[2:-2, 2:-2]
    assert np.abs(inner - 127).max() <= 3, "a 1-pixel checkerboard is grey at a quarter of its size"


def test_an_image_of_its_buckets_size_is_copied_byte_by_byte() -> None:
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        original = body(picture(32, 48, 1), kind)
        assert encode_image(original, Bucket(32, 48), Encoding()) == (suffix, original)
    assert encode_image(body(picture(32, 48, 1)), Bucket(32, 48), Encoding(channels=1))[0] == "jpg"


def test_transparent_parts_become_white_and_exif_turns() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    _, encoded = encode_image(body(clear), Bucket(10, 10), Encoding(format="png"))
    assert (np.asarray(Image.open(io.BytesIO(encoded))) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    flat = np.zeros((20, 40, 3), np.uint8)
    flat[:, :20] = 255  # white on the left, so that it is shown on top
    turned = body(Image.fromarray(flat), "JPEG", exif=exif, quality=95)
    assert image_size(turned) == (40, 20)
    _, encoded = encode_image(turned, Bucket(40, 20), Encoding(format="png"))
    shown = np.asarray(Image.open(io.BytesIO(encoded)))
    assert shown[:18].min() > 240 and shown[22:].max() < 15


def test_filters_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, dest = tmp_path / "scored", tmp_path / "packed"
    source.mkdir()
    rows = []
    for n in range(16):
        size = (20, 24) if n == 0 else (30, 200) if n == 1 else (40, 40)
        (source / f"{n}.png").write_bytes(body(picture(*size, n)))
        rows.append({"file_name": f"{n}.png", "text": f"picture {n}", "aesthetic": 2 if n == 2 else 6})
    rows[3]["aesthetic"] = "nan"
    rows[4]["text"] = "  "
    (source / "5.png").write_bytes(b"not an image")
    rows[6]["file_name"] = "absent.png"
    rows[7]["aesthetic"] = None
    (source / "8.png").write_bytes(cut_short(body(picture(40, 40, 8))))  # its header is whole
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filters = ("--min-side", "30", "--max-image-aspect", "3", "--score-column", "aesthetic", "--min-score", "5")
    assert main([str(source), str(dest), *SMALL, *HERE, *filters]) == 0
    output = capsys.readouterr().out
    assert "packed 7 images" in output
    for line in (
        "1 a side below 30 pixels",
        "1 aspect above 3",
        "2 aesthetic below 5",
        "1 no number in aesthetic",
        "1 no caption",
        "2 cannot be decoded as an image",
        "1 cannot be read",
    ):
        assert line in output
    names = left_out(dest)
    assert set(names) == {"absent.png", *(f"{n}.png" for n in (0, 1, 2, 3, 4, 5, 7, 8))}
    assert names["0.png"] == "20x24 pixels" and names["2.png"] == "aesthetic is 2"


def test_small_buckets_are_merged_kept_or_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "pets", 12, (*[(40, 40)] * 11, (34, 60)))
    found = {}
    for choice in ("merge", "keep", "drop"):
        dest = tmp_path / choice
        assert main([str(source), str(dest), *SMALL, *HERE, "--small-buckets", choice]) == 0
        found[choice] = {stream.name: stream.total for stream in read_manifest(str(dest)).streams()}
    assert found == {
        "merge": {"pets/32x32": 12},
        "keep": {"pets/32x32": 11, "pets/24x40": 1},
        "drop": {"pets/32x32": 11},
    }
    assert list(left_out(tmp_path / "drop").values()) == ["bucket 24x40: 1 images"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_of_every_kind_give_the_same_shards(tmp_path: Path, kind: str) -> None:
    source = write_folder(tmp_path / "set", 6)
    rows = [
        {"file_name": str(path.relative_to(source)), "caption": path.with_suffix(".txt").read_text()}
        for path in sorted(source.rglob("*g"))
        if path.is_file()
    ]
    table = source / f"metadata.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), table)
    for given, dest in ((source, "by-folder"), (table, "by-table")):
        assert main([str(given), str(tmp_path / dest), *SMALL, *HERE, "--name", "set"]) == 0
    tars = {name: content for name, content in contents(tmp_path / "by-table").items() if name.endswith(".tar")}
    assert tars and tars.items() <= contents(tmp_path / "by-folder").items()
    table.unlink()
    assert main([str(source), str(tmp_path / "plain"), *SMALL, *HERE]) == 0
    assert tars.items() <= contents(tmp_path / "plain").items(), "captions in files beside the images are the same"


def test_tars_are_packed_again_with_all_their_captions(tmp_path: Path) -> None:
    record = json.dumps({"caption": ["first", "second"]}).encode()
    members = {"a/1.jpg": body(picture(50, 50, 1), "JPEG"), "a/1.json": record, "2.txt": b"no image"}
    write_tar(tmp_path / "in" / "x.tar", members)
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), *SMALL, *HERE]) == 0
    (shard,) = read_manifest(str(tmp_path / "out")).shards
    (sample,) = webdataset.WebDataset(str(tmp_path / "out" / shard.name), shardshuffle=False).decode()
    assert sample["txt"] == "first"
    assert sample["json"] == {"caption": "first", "captions": ["first", "second"], "name": "x.tar/a/1.jpg"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("1.pkl", "is a pickle"), ("1.pth", "is a pickle"), ("../1.png", "leads outside"), ("/1.png", "leads")],
)
def test_hostile_tars_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    write_tar(tmp_path / "in" / "x.tar", {"0.png": body(picture(40, 40, 0)), "0.txt": b"zero", name: b"x"})
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), *SMALL, *HERE]) == 1
    error = capsys.readouterr().err
    assert message in error and "x.tar" in error
    assert contents(tmp_path / "out") == {}


def test_bombs_and_huge_captions_are_left_out(tmp_path: Path) -> None:
    source, dest = write_folder(tmp_path / "set", 4), tmp_path / "packed"
    (source / "bomb.png").write_bytes(bomb(30_000, 30_000))
    (source / "large.png").write_bytes(bomb(12_000, 12_600))  # above our limit, below Pillow's
    (source / "large.txt").write_text("a smaller bomb")
    (source / "bomb.txt").write_text("a bomb")
    (source / "long.png").write_bytes(body(picture(40, 40, 0)))
    (source / "long.txt").write_text("word " * 300_000)
    (source / "deep.png").write_bytes(body(Image.fromarray(np.zeros((40, 40), np.uint16))))
    (source / "deep.txt").write_text("sixteen bits")
    assert main([str(source), str(dest), *SMALL, *HERE]) == 0
    reasons = left_out(dest)
    assert reasons.keys() == {"bomb.png", "large.png", "long.png", "deep.png"}
    assert "bomb" in reasons["bomb.png"] and "bomb" in reasons["large.png"] and "not 8 bits" in reasons["deep.png"]
    assert reasons["long.png"].startswith("a file of more than")


@pytest.mark.parametrize("row", [{"file_name": "../secret.png"}, {"file_name": "/etc/passwd"}, {"file_name": 3}, {}])
def test_tables_that_lead_elsewhere_are_refused(tmp_path: Path, row: dict, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps({**row, "caption": "x"}) + "\n")
    assert main([str(tmp_path / "set"), str(tmp_path / "out"), *SMALL, *HERE]) == 1
    assert "metadata.jsonl, row 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [("--resolution", "500"), ("--min-score", "5"), ("--quality", "0"), ("--max-aspect", "0.5")]
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, wrong: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path), str(tmp_path / "out"), *wrong])
    assert error.value.code == 2


def test_a_source_without_images_says_what_was_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    for source in (tmp_path / "set", tmp_path / "absent"):
        assert main([str(source), str(tmp_path / "out"), *HERE]) == 1
        assert str(source) in capsys.readouterr().err
    write_folder(tmp_path / "set", len(SIZES))
    write_tar(tmp_path / "set" / "x.tar", {})
    assert main([str(tmp_path / "set"), str(tmp_path / "out"), *HERE]) == 1
    assert "pack them one by one" in capsys.readouterr().err


def test_a_source_in_a_bucket_is_refused_with_the_way_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["s3://bucket/tars", "packed"])
    assert "copy it here first" in capsys.readouterr().err
