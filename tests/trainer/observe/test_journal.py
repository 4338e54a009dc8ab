import errno
import json
import os
import threading
from pathlib import Path

import pytest

from trainer.observe import journal
from trainer.observe.journal import Journal, read


def contents(run_dir: Path) -> list[dict]:
    return [entry.content for entry in read(run_dir)]


def test_entries_are_on_disk_at_once_and_stamped_in_milliseconds(tmp_path: Path) -> None:
    record = Journal(tmp_path / "run", now=lambda: 12.3456)
    record.append("metrics", step=3, values={"loss": 0.1, "bad": float("nan"), "worse": float("-inf")})
    line = (tmp_path / "run" / "journal.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    values = {"loss": 0.1, "bad": "nan", "worse": "-inf"}
    assert strict == {"kind": "metrics", "time": 12345, "step": 3, "values": values}
    assert line.count("\n") == 1


def test_a_line_torn_by_a_kill_is_removed_and_the_rest_kept(tmp_path: Path) -> None:
    Journal(tmp_path).append("event", what="first")
    path = tmp_path / "journal.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"kind": "event", "what": "to' + b"x" * 100_000)
    Journal(tmp_path).append("event", what="second")
    assert [content["what"] for content in contents(tmp_path)] == ["first", "second"]
    assert [json.loads(line)["what"] for line in path.read_text().splitlines()] == ["first", "second"]


def test_reading_goes_on_from_an_offset_and_leaves_out_an_unfinished_line(tmp_path: Path) -> None:
    record = Journal(tmp_path)
    for what in "abc":
        record.append("event", what=what)
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'{"kind": "ev')
    first = next(iter(read(tmp_path)))
    assert [entry.content["what"] for entry in read(tmp_path, first.end)] == ["b", "c"]
    assert len(list(read(tmp_path, 0, most_bytes=1))) == 1
    assert list(read(tmp_path / "nowhere")) == []


def test_a_damaged_line_is_reported_and_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(tmp_path).append("event", what="a")
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b"\x00\xff garbage\n[1]\n")
    Journal(tmp_path).append("event", what="b")
    assert [content.get("what") for content in contents(tmp_path)] == ["a", None, None, "b"]
    assert caplog.text.count("no JSON object") == 2


def test_a_full_disk_delays_lines_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record, real_write = Journal(tmp_path), os.write
    record.append("event", what="a")

    def half_then_full(descriptor: int, data: bytes) -> int:
        if data.startswith(b'{"kind"'):
            return real_write(descriptor, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(journal.os, "write", half_then_full)
        for what in "bc":
            record.append("event", what=what)
    assert [content["what"] for content in contents(tmp_path)] == ["a"]
    record.append("event", what="d")
    assert [content["what"] for content in contents(tmp_path)] == ["a", "b", "c", "d"]
    assert caplog.text.count("No space left") == 1


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    record = Journal(tmp_path)

    def write(name: int) -> None:
        for i in range(50):
            record.append("event", name=name, i=i, filler="x" * 500)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = contents(tmp_path)
    for name in range(4):
        assert [entry["i"] for entry in entries if entry["name"] == name] == list(range(50))
