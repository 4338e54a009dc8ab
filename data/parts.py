"""One object by several streams at once: parts of it, each resumed by itself, written where they belong."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

PART = 8 << 20


@functools.cache
def fetch_pool(threads: int) -> ThreadPoolExecutor:
    """The download threads of this process; parts of objects are taken up in the order in which they were asked for."""
    return ThreadPoolExecutor(threads, thread_name_prefix="fetch")


def download_parts(
    body: Callable[[int, int | None], Iterator[bytes]], file: int, size: int, pool: ThreadPoolExecutor
) -> int:
    """Write an object of `size` bytes to file descriptor `file` by parts; returns the bytes that it really has.

    body: the object's bytes from a start, as many as said (None: to its end). The first failure is raised, when no part
    is being written any more.
    """

    def part(start: int, length: int | None) -> int:
        position = start
        for piece in body(start, length):
            view = memoryview(piece)
            while view:
                written = os.pwrite(file, view, position)
                view, position = view[written:], position + written
        return position - start

    # The last part goes to the end, wherever that is, so that an object that has grown is noticed.
    starts = range(0, size, PART)
    parts = [pool.submit(part, start, None if start == starts[-1] else PART) for start in starts]
    done, pending = wait(parts, return_when=FIRST_EXCEPTION)
    for future in pending:
        future.cancel()
    wait(future for future in pending if not future.cancelled())
    failed = next((future for future in done if future.exception()), None)
    return failed.result() if failed else sum(future.result() for future in parts)
