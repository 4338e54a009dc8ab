"""Several hosts on one machine: a network namespace each, joined by a bridge. Takes root and `ip` (iproute2)."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from types import TracebackType
from typing import Self

_NUMBERS = itertools.count()
INTERFACE = "eth0"
"""Name of every host's interface, inside its namespace."""


def why_not() -> str:
    """Why this machine cannot; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    if shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        return "`ip` is not installed (iproute2; tests/launcher/install_slurm.sh)"
    probe = f"tfprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "the kernel refuses network namespaces here"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


class Network:
    """Hosts 1 .. count with addresses 10.77.7.1 and on; this machine is 10.77.7.254. Use as a context manager."""

    def __init__(self, count: int) -> None:
        self.count = count
        # The kernel removes an interface some time after its namespace: a name is used once. 15 characters at most.
        self._tag = f"tf{os.getpid() % 100000}n{next(_NUMBERS)}"
        self.own_address = "10.77.7.254"

    def __enter__(self) -> Self:
        try:
            _ip("link", "add", self._tag, "type", "bridge")
            _ip("addr", "add", f"{self.own_address}/24", "dev", self._tag)
            _ip("link", "set", self._tag, "up")
            for host in range(1, self.count + 1):
                name, outside = self._name(host), self._outside(host)
                _ip("netns", "add", name)
                _ip("link", "add", outside, "type", "veth", "peer", "name", INTERFACE, "netns", name)
                _ip("link", "set", outside, "master", self._tag, "up")
                _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def address(self, host: int) -> str:
        return f"10.77.7.{host}"

    def on(self, host: int, *command: str) -> list[str]:
        """The command that runs `command` on a host. `ip netns exec` would also hide /sys/fs/cgroup, which slurmd wants."""
        return ["nsenter", f"--net=/run/netns/{self._name(host)}", *command]

    def pull(self, host: int) -> None:
        """Pull the cable of a host."""
        _ip("link", "set", self._outside(host), "down")

    def plug(self, host: int) -> None:
        _ip("link", "set", self._outside(host), "up")

    def _name(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def _outside(self, host: int) -> str:
        return f"{self._tag}v{host}"

    def _remove(self) -> None:
        for host in range(1, self.count + 1):
            found = subprocess.run(["ip", "netns", "pids", self._name(host)], capture_output=True, text=True)
            for number in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self._name(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._tag], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
