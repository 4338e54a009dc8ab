"""A copy of the code in the run's folder: what waits in a queue is not changed by later edits."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

PACKAGES = ("configs", "data", "models", "trainer", "launcher")


def snapshot(root: Path, destination: Path) -> tuple[Path, str]:
    """Copy the code below `root` to `destination`/<digest>, unless that very code is there; the folder, and the
    revision: git's hash, with + where files differ from it, or `none` without git."""
    files = _files(root)
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\0".encode() + hashlib.sha256((root / name).read_bytes()).digest())
    target = destination / digest.hexdigest()[:12]
    if not target.exists():
        partial = destination / f".{target.name}.{os.getpid()}"
        for name in files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, partial / name)
        partial.rename(target)
    return target, _revision(root)


def _files(root: Path) -> list[str]:
    """What git tracks and what it would track, as it lies there; without git all Python and YAML files of ours."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is not None:
        names = [name for name in listed.split("\0") if name]
    else:
        names = [
            str(path.relative_to(root))
            for package in PACKAGES
            for path in (root / package).rglob("*")
            if path.suffix in (".py", ".yaml")
        ]
    return sorted(name for name in set(names) if (root / name).is_file())


def _revision(root: Path) -> str:
    said = _git(root, "describe", "--always", "--abbrev=40", "--dirty=+")
    return said.strip() if said else "none"


def _git(root: Path, *arguments: str) -> str | None:
    """Output of git in `root`; None where there is no git or `root` is not the top of a checkout."""
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
