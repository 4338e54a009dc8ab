"""A disk that is too small for anything."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    if os.getuid():
        pytest.skip("only root may mount a tmpfs")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tiny", str(tmp_path)], capture_output=True)
    if done.returncode:
        pytest.skip("this container may not mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)
