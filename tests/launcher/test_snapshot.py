from __future__ import annotations

import subprocess
from pathlib import Path

from launcher.snapshot import snapshot


def git(root: Path, *arguments: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)


def checkout(root: Path) -> Path:
    (root / "trainer").mkdir(parents=True)
    (root / "trainer" / "train.py").write_text("first\n")
    (root / ".gitignore").write_text("/outputs/\n")
    (root / "outputs").mkdir()
    (root / "outputs" / "huge.bin").write_text("")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "x")
    return root


def test_the_copy_is_the_working_tree_without_what_git_ignores_and_stays_as_it_was(tmp_path: Path) -> None:
    root = checkout(tmp_path / "root")
    first, clean = snapshot(root, tmp_path / "code")
    assert len(clean) == 40
    (root / "trainer" / "train.py").write_text("second\n")
    (root / "trainer" / "new.py").write_text("untracked, and part of it all the same\n")
    second, dirty = snapshot(root, tmp_path / "code")
    assert dirty == clean + "+" and first != second
    assert (first / "trainer" / "train.py").read_text() == "first\n"
    assert (second / "trainer" / "train.py").read_text() == "second\n" and (second / "trainer" / "new.py").exists()
    assert not (second / "outputs").exists() and not (second / ".git").exists()
    assert snapshot(root, tmp_path / "code")[0] == second  # the same code is there already


def test_an_installed_tree_without_git_is_copied_too(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "load.py").write_text("x")
    (root / "secret.env").write_text("x")
    copy, revision = snapshot(root, tmp_path / "code")
    assert revision == "none" and [path.name for path in copy.rglob("*") if path.is_file()] == ["load.py"]
