"""Folders: writable, full, read-only, slow to appear; nothing is left behind."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.health import disk
from trainer.health.findings import GREEN, RED, YELLOW, Finding

MIB = 1 << 20


def look(path: Path, needed: float = 0, size: int = 2 * MIB) -> Finding:
    (found,) = disk.folder("run", path, "run.dir", needed, "checkpoints", size)
    return found


def test_a_folder_that_does_not_exist_yet_is_measured_above_it_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_SLOW", 0.0)
    found = look(tmp_path / "runs" / "pets")
    assert found.level == GREEN and "MB/s with fsync" in found.value
    assert list(tmp_path.iterdir()) == []


def test_a_path_through_a_file_is_red(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = look(tmp_path / "file" / "run")
    assert found.level == RED and "Not a directory" in found.value and "run.dir" in found.remedy


def test_too_little_space_and_a_slow_disk_are_yellow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(tmp_path, needed=1e18)
    assert found.level == YELLOW and "1000000000.0 GB wanted (checkpoints)" in found.value
    monkeypatch.setattr(disk, "_SLOW", 1e15)
    found = look(tmp_path)
    assert found.level == YELLOW and "faster disk" in found.remedy


def test_a_full_disk_is_red_and_a_small_one_is_not_filled(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_SLOW", 0.0)
    assert look(mounted).level == GREEN  # by a file of a quarter of what is free
    (mounted / "rest").write_bytes(bytes(MIB - 8192))
    found = look(mounted)
    assert found.level == RED and "is full" in found.value and "larger disk" in found.remedy


def test_a_read_only_disk_is_red(mounted: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    found = look(mounted / "runs")
    assert found.level == RED and "Read-only file system" in found.value


def test_nodes_see_the_mark_of_rank_0_or_say_that_the_folder_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = disk.SharedMark(tmp_path / "run")
    path = mark.make()
    (found,) = disk.shared(path)
    assert found.level == GREEN
    mark.remove()
    assert list(tmp_path.iterdir()) == []
    later = threading.Timer(0.3, Path(path).touch)
    later.start()  # network file systems take a while
    (found,) = disk.shared(path)
    later.join()
    assert found.level == GREEN
    monkeypatch.setattr(disk, "_SEEN_S", 0.1)
    (found,) = disk.shared(str(tmp_path / "other"))
    assert found.level == RED and "share" in found.remedy


def test_the_size_of_a_checkpoint_follows_from_the_weights(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    save_file({"a": torch.zeros(10, 3, dtype=torch.bfloat16)}, tmp_path / "transformer" / "one.safetensors")
    save_file({"b": torch.zeros(5), "c": torch.zeros(())}, tmp_path / "transformer" / "two.safetensors")
    assert disk.checkpoint_bytes(tmp_path, averaged=True) == 36 * 4 * 4
    assert disk.checkpoint_bytes(tmp_path, averaged=False) == 36 * 4 * 3
    assert disk.checkpoint_bytes(tmp_path / "absent", averaged=True) == 0
