"""List, compare and verify checkpoints: python -m trainer.saving.checkpoints_cli ls RUN | diff A B | verify CHECKPOINT

RUN is a run's folder, or the folder or s3:// prefix that holds its checkpoints. A checkpoint is RUN/step_00000500, on
disk or S3, or a RUN, which means its newest complete one. Exit status 0: as it should be (diff: equal within --bound);
1: not; 2: cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.folders import OURS
from data.s3 import DataError
from trainer.saving import checkpoint_content, checkpoint_store
from trainer.saving.certificate import Certificate, CheckpointError
from trainer.saving.checkpoint import SAVED_AT
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoint_store import CheckpointStore, open_store

WORST = 10
"""Tensors that diff names where --all does not ask for every one."""
console = Console(markup=False, emoji=False, highlight=False)


def place(text: str, endpoint_url: str | None) -> tuple[CheckpointStore, str | None]:
    """Where the checkpoints of a RUN lie; for a CHECKPOINT its name as well."""
    parent, _, last = text.rstrip("/").rpartition("/")
    try:
        checkpoint_store.step_of(last)
    except ValueError:
        return _of_run(text, endpoint_url), None
    return _of_run(parent or ".", endpoint_url), last


def _of_run(text: str, endpoint_url: str | None) -> CheckpointStore:
    record = Path(text) / OURS
    if "://" in text or not record.exists():
        return open_store(text, endpoint_url)
    known: dict[str, Any] = json.loads(record.read_text()).get("circumstance", {})
    endpoint_url = endpoint_url or known.get("checkpoint.endpoint_url") or known.get("data.endpoint_url")
    return open_store(known.get("checkpoint.dir") or Path(text) / "checkpoints", endpoint_url)


def reader(text: str, endpoint_url: str | None) -> CheckpointReader:
    """The checkpoint that is named, or a run's newest complete one."""
    store, name = place(text, endpoint_url)
    name = name or checkpoint_store.latest(store)
    if name is None:
        raise CheckpointError(f"{store.url} holds no complete checkpoint")
    return CheckpointReader(store, name)


def show(options: argparse.Namespace) -> int:
    store, _ = place(options.run, options.endpoint_url)
    listing = store.listing()
    if not listing:
        raise CheckpointError(f"{store.url} holds no checkpoints")
    table = Table("step", "GB", "age", "ranks", "engine", "state")
    for name in checkpoint_store.newest_first(listing):
        try:
            certificate, state = checkpoint_store.checked(store, name, listing[name]), "complete"
        except CheckpointError as error:
            certificate, state = None, str(error)
        size = f"{sum(listing[name].values()) / 1e9:.3f}"
        table.add_row(str(checkpoint_store.step_of(name)), size, *_origin(certificate), state)
    print(store.url)
    console.print(table)
    return 0


def _origin(certificate: Certificate | None) -> tuple[str, str, str]:
    """Age, ranks and engine."""
    if certificate is None:
        return "", "", ""
    metadata = certificate.metadata
    return _age(metadata.get(SAVED_AT)), str(metadata.get("world_size", "")), str(metadata.get("engine", ""))


def _age(saved_at: str | None) -> str:
    if saved_at is None:
        return ""
    minutes = (datetime.now(UTC) - datetime.fromisoformat(saved_at)).total_seconds() / 60
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"


def diff(options: argparse.Namespace) -> int:
    first, second = (reader(text, options.endpoint_url) for text in (options.first, options.second))
    print(f"a: {first.url}\nb: {second.url}")
    _print_counters(first.certificate, second.certificate)
    found = checkpoint_content.compare(first, second)
    for side, names in zip("ab", found.only, strict=True):
        for name in names:
            print(f"only in {side}: {name}")
    table = Table("tensor", "error", "max |a-b|")
    print("error: ||a-b|| / max(||b||, 1e-3 of the group's norm)")
    ordered = sorted(found.differences, key=lambda each: each.error, reverse=True)
    for each in ordered if options.all else ordered[:WORST]:
        table.add_row(f"{each.group}/{each.name}", f"{each.error:.3g}", f"{each.largest:.3g}")
    console.print(table)
    equal = found.within(options.bound)
    apart = sum(each.error > options.bound for each in ordered)
    print(
        f"{len(ordered)} tensors compared, {apart} of them apart by more than {options.bound:g}; "
        f"{sum(map(len, found.only))} in one alone: {'same' if equal else 'different'}"
    )
    return 0 if equal else 1


def _print_counters(first: Certificate, second: Certificate) -> None:
    pairs = {"step": (first.step, second.step)}
    for name in sorted(first.counters.keys() | second.counters.keys()):
        pairs[name] = (first.counters.get(name), second.counters.get(name))  # type: ignore[assignment]
    for name in ("engine", "world_size", "accumulation", "identity_digest", "code_revision"):
        pairs[name] = (first.metadata.get(name), second.metadata.get(name))  # type: ignore[assignment]
    for name, (a, b) in pairs.items():
        if a != b:
            print(f"{name}: {a} and {b}")


def verify(options: argparse.Namespace) -> int:
    checkpoint = reader(options.checkpoint, options.endpoint_url)
    certificate, wrong, count = checkpoint.certificate, 0, 0
    for name, flaw in checkpoint_content.flaws(checkpoint):
        count += 1
        if flaw:
            wrong += 1
            print(f"{name}: {flaw}")
    size = sum(certificate.files.values()) / 1e9
    verdict = f"{wrong} of them are not as they should be" if wrong else "all present, readable and finite"
    print(
        f"{checkpoint.url}: step {certificate.step}, {len(certificate.files)} files, {size:.3f} GB, {count} tensors in "
        f"{', '.join(certificate.tensors)}: {verdict}"
    )
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="twinflow checkpoint", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="ls | diff | verify")
    listing = verbs.add_parser("ls", help="step, size, age, ranks, engine, and whether it is complete")
    listing.add_argument("run", metavar="RUN")
    listing.set_defaults(action=show)
    comparing = verbs.add_parser("diff", help="how far two checkpoints are apart, tensor by tensor")
    comparing.add_argument("first", metavar="A")
    comparing.add_argument("second", metavar="B")
    comparing.add_argument("--bound", type=float, default=0.0, help="largest error that counts as equal; default 0")
    comparing.add_argument("--all", action="store_true", help=f"every tensor, not only the {WORST} that differ most")
    comparing.set_defaults(action=diff)
    verifying = verbs.add_parser("verify", help="read all of a checkpoint: files, coverage, every tensor finite")
    verifying.add_argument("checkpoint", metavar="CHECKPOINT")
    verifying.set_defaults(action=verify)
    for verb in (listing, comparing, verifying):
        verb.add_argument("--endpoint-url", help="S3 endpoint for stores other than AWS; default: the run's")
    options = parser.parse_args(arguments)
    try:
        code: int = options.action(options)
    except (CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
