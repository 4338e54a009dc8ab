"""Which failures of an object store are worth another attempt, and how long one object may keep a run waiting."""

from __future__ import annotations

import http.client
import math
import random
import threading
import time
from collections import Counter
from typing import Any

# A body that comes more slowly than this loses time, so that one byte now and then is no progress [bytes/s].
_SLOWEST = 128 << 10
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_LONGEST_SILENCE_S = 30.0
# Names that stores give to "later, please", whatever the HTTP status they come with.
_LATER = frozenset(
    {
        "InternalError",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
    }
)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509})


class Losses:
    """Time lost on one object by all streams that read parts of it: what several lose at once counts once."""

    def __init__(self) -> None:
        self.seconds, self.failures = 0.0, Counter[str]()
        self._until, self._lock = -math.inf, threading.Lock()

    def add(self, seconds: float) -> None:
        """Count the last `seconds` seconds."""
        with self._lock:
            now = time.monotonic()
            self.seconds += min(seconds, now - self._until)
            self._until = now


class Budget:
    """Time that may be lost on one object: failed attempts, waits between them, and a body slower than 128 KiB/s.

    The transfer itself is not counted, so that a budget of a minute serves small and large objects alike. One stream has
    one budget; losses: shared by the streams of an object.
    """

    def __init__(self, seconds: float, losses: Losses | None = None) -> None:
        self.seconds, self._losses = seconds, losses or Losses()
        self._in_a_row, self._slow_s = 0, 0.0

    @property
    def lost_s(self) -> float:
        return self._losses.seconds

    def received(self, count: int, elapsed_s: float) -> None:
        """Count what `count` bytes in `elapsed_s` seconds lost. Raises TimeoutError where this body loses too much."""
        lost_s = max(0.0, elapsed_s - count / _SLOWEST)
        if lost_s:
            self._losses.add(lost_s)
        self._slow_s += lost_s
        if count and not lost_s:
            self._in_a_row = 0
        if self._slow_s > longest_silence_s(self.seconds):
            raise TimeoutError(f"the body came more slowly than {_SLOWEST >> 10} KiB/s")

    def again(self, error: Exception, elapsed_s: float) -> bool:
        """Count a failed attempt and wait a while; False at once where no time is left for another attempt."""
        self._losses.add(elapsed_s)
        self._slow_s = 0.0
        self._losses.failures[code_of(error)] += 1
        left = self.seconds - self.lost_s - 1.5 * longest_silence_s(self.seconds)  # another attempt must fit in
        if left <= 0:
            return False
        longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(self._in_a_row, 16))
        self._in_a_row += 1
        # Jitter: the ranks of a job fail together and must not come back together.
        wait = min(longest * random.uniform(0.5, 1.0), left)
        time.sleep(wait)
        self._losses.add(wait)
        return True

    def __str__(self) -> str:
        tried = ", ".join(f"{count} x {code}" for code, count in self._losses.failures.most_common(4))
        attempts = self._losses.failures.total()
        return (
            f"{attempts} failed attempts ({tried}) and {self.lost_s:.1f} s lost of data.read_budget_s={self.seconds:g}"
        )


def longest_silence_s(budget_s: float) -> float:
    """A connection that says nothing, or loses by slowness, for so long is given up [s]: time for several attempts."""
    return min(_LONGEST_SILENCE_S, budget_s / 6)


def code_of(error: Exception) -> str:
    """Name of a failure: the store's code, else the exception's type."""
    return str(_response(error).get("Error", {}).get("Code") or type(error).__name__)


def status_of(error: Exception) -> int | None:
    """HTTP status of a refused request."""
    status: int | None = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    import urllib3
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        return status_of(error) in _TRANSIENT_STATUS or code_of(error) in _LATER
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    broken = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)
    return isinstance(error, (*broken, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError))


def _response(error: Exception) -> dict[str, Any]:
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return response
