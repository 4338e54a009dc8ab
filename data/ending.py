"""How the commands that move data end: what was wrong in one line, or that they were interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable

from data.s3 import DataError


def exit_status(work: Callable[[], int], interrupted: str, *failures: type[Exception]) -> int:
    """What `work` returns; 1 after a DataError or one of `failures`, 130 after Ctrl-C, whose consequence `interrupted`
    tells."""
    expected: tuple[type[Exception], ...] = (DataError, *failures)
    try:
        return work()
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
