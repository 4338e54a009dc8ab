"""The faults that the reader must survive or explain, one row each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from data import s3
from data.s3 import open_folder
from tests.benchmarks.fault_bench import BUDGET_S, MOTO, RCLONE, TAR, URL, Bench
from tests.data import rclone
from tests.data.fault_proxy import Fault

FOREVER = 10**9
Breaker = Callable[[Bench, str, np.random.Generator], Fault | None]


@dataclass(frozen=True)
class Row:
    """One kind of fault. error: None where it must pass, else what the message must match; changes: what breaks the
    store itself for the time of one reading."""

    name: str
    fault: Breaker
    error: str | None = None
    servers: tuple[str, ...] = (MOTO, RCLONE)
    changes: Callable[[Bench, str], AbstractContextManager[None]] | None = None
    ranks: bool = False


def within(bench: Bench, rng: np.random.Generator) -> int:
    """A place in the response of the shard, most often in its body [bytes]."""
    return int(rng.integers(1, bench.size))


def cut(kind: str, most_times: int = 1, **options: Any) -> Breaker:
    """Responses that are broken somewhere in the middle."""
    return lambda bench, server, rng: Fault(kind, within(bench, rng), int(rng.integers(1, most_times + 1)), **options)


def answer(*answers: tuple[int, str], times: int = 2) -> Breaker:
    def breaker(bench: Bench, server: str, rng: np.random.Generator) -> Fault:
        status, code = answers[rng.integers(len(answers))]
        return Fault("answer", times=times, status=status, code=code)

    return breaker


def put_midway(body: Callable[[Bench], bytes | None]) -> Breaker:
    """The object is replaced or removed while it is read."""

    def breaker(bench: Bench, server: str, rng: np.random.Generator) -> Fault:
        after = int(rng.integers(2000, bench.size))
        return Fault("reset", after, match=TAR, action=lambda: bench.put(server, TAR, body(bench)))

    return breaker


def other(bench: Bench) -> bytes:
    """A shard of the same size and another content."""
    return bytes(bench.size)


def nothing(bench: Bench, server: str, rng: np.random.Generator) -> None:
    return None


@contextlib.contextmanager
def replaced(bench: Bench, server: str) -> Iterator[None]:
    bench.put(server, TAR, other(bench))
    yield


@contextlib.contextmanager
def deleted(bench: Bench, server: str) -> Iterator[None]:
    bench.put(server, TAR, None)
    yield


@contextlib.contextmanager
def wrong_credentials(bench: Bench, server: str) -> Iterator[None]:
    place = open_folder(URL, bench.proxies[server].endpoint_url, BUDGET_S)
    assert isinstance(place, s3.S3Folder)

    def set_secret(secret: str) -> None:
        os.environ["AWS_SECRET_ACCESS_KEY"] = secret
        s3._client.cache_clear()  # a process reads its credentials once
        _ = place._client  # made now, since that takes a second

    set_secret("another-secret")
    try:
        yield
    finally:
        set_secret(rclone.SECRET)


GONE = rf"{URL}/\S+ at http://127.*data\.endpoint_url|{URL}/\S+ at http://127.*raise data\.read_budget_s"
ROWS = (
    Row("connection reset", cut("reset", 3), ranks=True),
    Row("truncation", cut("truncate", 2)),
    Row("stall", cut("stall")),
    Row("500/503", answer((500, "InternalError"), (503, "ServiceUnavailable"))),
    Row("throttling", answer((503, "SlowDown"), (429, "TooManyRequests"), (400, "RequestTimeout"))),
    Row("slow start", lambda *_: Fault("delay", seconds=0.2, times=FOREVER)),
    Row("very slow start, once", lambda *_: Fault("delay", seconds=1.0)),
    Row("dripping body", lambda *_: Fault("drip", after=5000, seconds=0.02)),
    Row(
        "server killed, restarted",
        lambda bench, server, rng: Fault("reset", within(bench, rng), action=bench.restart),
        servers=(RCLONE,),
    ),
    Row("server gone", lambda *_: Fault("refuse", times=FOREVER), GONE, ranks=True),
    Row("stall without end", lambda *_: Fault("stall", after=5000, times=FOREVER), GONE),
    Row("503 without end", answer((503, "SlowDown"), times=FOREVER), GONE, (MOTO,)),
    Row("ETag changed", nothing, rf"{URL}/{TAR}: changed.*\(ETag .*, expected .*restore the object", changes=replaced),
    Row("ETag changed midway", put_midway(other), rf"{URL}/{TAR}: changed.*ETag .*, expected .*restore the object"),
    Row("object deleted", nothing, rf"{URL}/{TAR}: missing.*finish the copy", changes=deleted),
    Row("object deleted midway", put_midway(lambda bench: None), rf"{URL}/{TAR} at .*check the URL", ranks=True),
    Row("wrong credentials", nothing, rf"{URL}.* at .*credentials", (RCLONE,), wrong_credentials),
)
