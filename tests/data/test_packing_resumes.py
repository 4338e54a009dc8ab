"""Packing that is killed, stopped, repeated, sent to S3 or done twice at once."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from data.manifest import read_manifest
from data.pack import main
from data.s3 import DataError
from data.store import S3Store, open_store, sole_writer
from data.verify import verify
from tests.data.conftest import ObjectStore
from tests.data.pictures import SMALL, body, contents, picture, start, write_folder

HERE = ("--workers", "0")


@pytest.mark.slow
def test_a_packing_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pets", 400)
    command = [str(source), "", *SMALL, "--shard-mb", "0.08", "--name", "pets"]
    (source / "broken.png").write_bytes(body(picture(40, 40, 8))[:-40])
    (source / "broken.txt").write_text("broken")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*command[:1], str(whole), *command[2:], *HERE]) == 0
    expected = contents(whole)

    process = start("data.pack", *command[:1], str(killed), *command[2:], "--workers", "1")
    deadline = time.monotonic() + 60
    while len(list(killed.glob("*.idx"))) < 2 and time.monotonic() < deadline:
        for path in killed.glob("*.tar"):
            assert path.read_bytes() == expected[path.name], "half a shard is in the destination"
        time.sleep(0.002)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(family) >= 2 and not psutil.wait_procs(family, timeout=10)[1], "workers outlive the packing"
    left = {name: content for name, content in contents(killed).items() if not name.startswith(".packing")}
    assert len(left) < len(expected), "killed too late to prove anything"
    assert "manifest.json" not in left
    assert left.items() <= expected.items(), "half a file is in the destination"

    kept = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.idx")}
    assert main([*command[:1], str(killed), *command[2:], *HERE]) == 0
    assert contents(killed) == expected
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in killed.glob("*.idx")}.items()


@pytest.mark.slow
def test_ctrl_c_ends_soon_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source, dest = write_folder(tmp_path / "pets", 400), tmp_path / "dest"
    command = [str(source), str(dest), *SMALL, "--shard-mb", "0.02"]
    process = start("data.pack", *command, "--workers", "1")
    deadline = time.monotonic() + 60
    while not list(dest.glob("*.idx")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command goes on" in output and "Traceback" not in output
    assert not (dest / ".packing").exists() and not (dest / "manifest.json").exists()
    assert main([*command, *HERE]) == 0
    assert verify(str(dest)) == (400, [])


def test_after_a_packing_that_left_nothing_other_options_are_welcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(write_folder(tmp_path / "pets", 8)), str(tmp_path / "dest"), *SMALL, *HERE]
    assert main([*command, "--min-side", "1000"]) == 1
    assert "nothing is left to pack; left out: 8 a side below 1000 pixels" in capsys.readouterr().err
    assert main(command) == 0


def test_other_content_and_other_options_are_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, dest = write_folder(tmp_path / "pets", 8), tmp_path / "dest"
    dest.mkdir()
    (dest / "thesis.txt").write_text("mine")
    assert main([str(source), str(dest), *SMALL, *HERE]) == 1
    assert "holds something else (thesis.txt)" in capsys.readouterr().err
    assert contents(dest) == {"thesis.txt": b"mine"}
    (dest / "thesis.txt").unlink()
    assert main([str(source), str(dest), *SMALL, *HERE]) == 0
    before = contents(dest)
    assert main([str(source), str(dest), *SMALL, *HERE, "--quality", "90"]) == 1
    assert "packed with other encoding" in capsys.readouterr().err
    (source / "new.png").write_bytes(body(picture(40, 40, 99)))
    (source / "new.txt").write_text("new")
    assert main([str(source), str(dest), *SMALL, *HERE]) == 1
    assert "from other images" in capsys.readouterr().err
    assert contents(dest) == before
    assert main([str(source), str(source / "inside"), *SMALL, *HERE]) == 1
    assert "lies in SOURCE" in capsys.readouterr().err


def test_packing_to_s3_gives_the_same_set_and_resumes(
    tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    source, here = write_folder(tmp_path / "pets", 24), tmp_path / "here"
    store.client.create_bucket(Bucket="packed")
    command = [str(source), "s3://packed/sets/pets", *SMALL, *HERE, "--endpoint-url", store.endpoint_url]
    assert main([str(source), str(here), *SMALL, *HERE]) == 0
    assert main([*command, "--workers", "1"]) == 0
    objects = {
        entry["Key"].removeprefix("sets/pets/"): store.client.get_object(Bucket="packed", Key=entry["Key"])[
            "Body"
        ].read()
        for entry in store.client.list_objects_v2(Bucket="packed")["Contents"]
    }
    expected = contents(here)
    assert {k: v for k, v in objects.items() if k != "manifest.json"} == {
        k: v for k, v in expected.items() if k != "manifest.json"
    }
    manifest = read_manifest("s3://packed/sets/pets", store.endpoint_url)
    assert manifest.digest == read_manifest(str(here)).digest
    for shard in manifest.shards:
        assert shard.etag == store.client.head_object(Bucket="packed", Key=f"sets/pets/{shard.name}")["ETag"]
    # One shard lost its index, as after a kill between the two uploads: it alone is made again.
    store.client.delete_object(Bucket="packed", Key=f"sets/pets/{manifest.shards[0].index_name}")
    store.client.delete_object(Bucket="packed", Key="sets/pets/manifest.json")
    capsys.readouterr()
    assert main(command) == 0
    again = read_manifest("s3://packed/sets/pets", store.endpoint_url)
    assert again == manifest
    assert not list(tmp_path.glob("twinflow-packing*")), "scratch files stay behind"


def test_large_files_are_uploaded_in_parts_and_broken_uploads_are_removed(
    tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.store._PART", 5 << 20)
    store.client.create_bucket(Bucket="parts")
    for key in ("p/old.tar", "p/deeper/other.tar", "elsewhere.tar"):
        store.client.create_multipart_upload(Bucket="parts", Key=key)
    there = open_store("s3://parts/p", store.endpoint_url)
    assert isinstance(there, S3Store)
    there.clean()
    left = {upload["Key"] for upload in store.client.list_multipart_uploads(Bucket="parts").get("Uploads", ())}
    assert left == {"p/deeper/other.tar", "elsewhere.tar"}, "uploads of another data set are not ours to end"
    content = os.urandom(11 << 20)
    (tmp_path / "x.tar").write_bytes(content)
    etag = there.publish(tmp_path / "x.tar", "x.tar")
    assert there.read("x.tar") == content
    assert there.files()["x.tar"].etag == etag and str(etag).strip('"').endswith("-3")


def test_a_link_in_place_of_the_scratch_folder_empties_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    store = S3Store("bucket", "set", None)
    store.scratch().symlink_to(tmp_path / "home")
    with pytest.raises(DataError, match="is a link or belongs to another user"), sole_writer(store):
        pass
    assert contents(tmp_path / "home") == {"thesis.txt": b"mine"}


def test_two_packers_do_not_share_a_destination(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "dest"))
    with sole_writer(store), pytest.raises(DataError, match="another process is writing"), sole_writer(store):
        pass
