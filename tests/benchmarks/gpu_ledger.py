"""Rows of a benchmark that may be cut off at any moment: each is on disk and on the screen as soon as it is known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Values = dict[str, Any]


class NotHere(Exception):
    """A row that this machine cannot measure; the message says why. It counts neither for nor against."""


@dataclass(frozen=True)
class Row:
    """key: what is measured, the row's identity; seconds: expected at most; measure: does it."""

    key: str
    seconds: float
    measure: Callable[[], Values]


class Ledger:
    """A JSON-lines file of measured rows; rows of another `machine` (any JSON value) in it are left alone.

    retry: rows that failed are measured again. deadline: time.monotonic() after which no row begins.
    """

    def __init__(self, path: Path, machine: Any, deadline: float, retry: bool = False) -> None:
        self._path, self._machine, self._deadline = path, machine, deadline
        self.rows: dict[str, Values] = {}
        self.left_out: list[str] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the line at which an earlier run was cut off
                continue
            if row["machine"] == machine and not (retry and "error" in row):
                self.rows[row["key"]] = row

    def take(self, row: Row) -> Values | None:
        """Measure a row, unless it is known already or there is no time for it: then its values, or None."""
        if row.key in self.rows:
            return self.rows[row.key]
        left = self._deadline - time.monotonic()
        if row.seconds > left:
            self.left_out.append(row.key)
            print(f"{row.key}: left out, {row.seconds:.0f} s expected and {max(left, 0):.0f} s left", flush=True)
            return None
        began = time.monotonic()
        try:
            values = row.measure()
        except NotHere as reason:
            values = {"not_run": str(reason)}
        except Exception as error:  # the rows after it are worth having
            values = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
        return self._add(row.key, values | {"seconds": round(time.monotonic() - began, 1)})

    def _add(self, key: str, values: Values) -> Values:
        self.rows[key] = {"machine": self._machine, "key": key, **values}
        lead = "" if not self._path.exists() or self._path.read_bytes().endswith(b"\n") else "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(f"{lead}{json.dumps(self.rows[key])}\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{key}: {shown(values)}", flush=True)
        return self.rows[key]


def shown(values: Values) -> str:
    """Values of a row in one line."""
    hidden = ("machine", "key")
    parts = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if name not in hidden
    ]
    return ", ".join(parts)
