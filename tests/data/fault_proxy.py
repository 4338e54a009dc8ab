"""A TCP proxy before an object store that breaks chosen responses: `proxy.inject(Fault("reset", after=1000))`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Fault:
    """What happens to the next `times` responses to requests whose first line holds `match`.

    reset | truncate | stall: the connection is reset, closed or falls silent `after` bytes of the response (headers
    included); drip: from there on one byte every `seconds`; delay: the response starts `seconds` late; answer: the
    store is not asked, the proxy answers `status` with the error `code`; refuse: reset in place of a response.
    action: called before a connection is reset, closed or silenced.
    """

    kind: str
    after: int = 0
    times: int = 1
    seconds: float = 0.0
    status: int = 503
    code: str = "SlowDown"
    match: str = ".tar"
    action: Callable[[], None] | None = None


@dataclass
class _Connection:
    passed: Counter[str]
    path: str = ""
    fault: Fault | None = None
    sent: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and passes everything on to `upstream`, a port of the same machine.

    hits: responses broken so far; requests: seen so far, gets: of those the GETs of each path; passed: bytes of the
    store's responses to requests for each path, headers included. Usable from any thread.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream, self.hits, self.requests = upstream, 0, 0
        self.passed: Counter[str] = Counter()
        self.gets: Counter[str] = Counter()
        self._fault: Fault | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(self._handle, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
        self.endpoint_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def inject(self, fault: Fault | None) -> None:
        """Break the next responses, or none of them."""
        self._fault = fault

    def stop(self) -> None:
        async def end() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _take(self, line: bytes) -> Fault | None:
        fault = self._fault
        if fault is None or fault.times <= 0 or fault.match.encode() not in line:
            return None
        fault.times -= 1
        self.hits += 1
        return fault

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, up = _Connection(self.passed), None
        back: asyncio.Task[None] | None = None
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                method, connection.path = head.split(b"\r\n")[0].decode("latin-1").split(" ")[:2]
                self.gets[connection.path] += method == "GET"
                connection.fault, connection.sent = self._take(head.split(b"\r\n")[0]), 0
                fault = connection.fault
                if fault and fault.kind == "refuse":
                    _reset(writer)
                    break
                if fault and fault.kind == "answer":
                    writer.write(_answer(fault))
                    await writer.drain()
                    break
                if up is None:
                    down, up = await asyncio.open_connection("127.0.0.1", self.upstream)
                    back = asyncio.create_task(_pass_back(down, writer, connection))
                up.write(head)
                await up.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client, the store or the test has gone: the connection ends
        finally:
            connection.closed.set()
            if back:
                back.cancel()
            for end in (writer, up):
                if end:
                    end.close()


async def _pass_back(down: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection) -> None:
    """The store's responses to the client, as the fault of each says."""
    with contextlib.suppress(OSError):
        while data := await down.read(1 << 16):
            fault = connection.fault
            connection.passed[connection.path] += len(data)
            if fault and fault.kind == "delay" and not connection.sent:
                await asyncio.sleep(fault.seconds)
            if fault and fault.kind != "delay" and connection.sent + len(data) > fault.after:
                kept = max(0, fault.after - connection.sent)
                writer.write(data[:kept])
                await writer.drain()
                if fault.kind == "drip":
                    await _drip(data[kept:], writer, fault.seconds)
                    connection.sent += len(data)
                    continue
                if fault.action:
                    await asyncio.to_thread(fault.action)
                if fault.kind == "stall":
                    await connection.closed.wait()
                if fault.kind == "reset":
                    _reset(writer)
                break
            writer.write(data)
            connection.sent += len(data)
            await writer.drain()
        writer.close()


async def _drip(data: bytes, writer: asyncio.StreamWriter, seconds: float) -> None:
    for i in range(len(data)):
        writer.write(data[i : i + 1])
        await writer.drain()
        await asyncio.sleep(seconds)


def _answer(fault: Fault) -> bytes:
    body = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
    head = f"HTTP/1.1 {fault.status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST in place of an orderly end."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
