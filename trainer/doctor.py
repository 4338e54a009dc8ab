"""`twinflow doctor [CONFIG]`: are this machine and this allocation fit to train? python -m trainer.doctor, on one rank or
under torchrun. A table of what was found, then one JSON line; the exit status is 1 where something is red.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from configs import load as configuration
from configs.schema import Config
from trainer.engines.distributed import process_group
from trainer.health.checks import BRIEF, THOROUGH
from trainer.health.examination import Report, examine
from trainer.health.findings import RED, json_report
from trainer.train import check_package

_TIMEOUT_S = 120.0


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 where something is red, 2 where the configuration is refused."""
    check_package()
    parser = argparse.ArgumentParser(prog="python -m trainer.doctor", description=__doc__)
    parser.add_argument("--config", action="append", default=[], help="YAML file; several are merged left to right")
    parser.add_argument("--quick", action="store_true", help="what a submitted job checks at its start")
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args(arguments)
    first = os.environ.get("RANK", "0") == "0"
    try:
        config = _load(options.config, options.overrides)
    except configuration.ConfigError as error:
        if first:
            print(error, file=sys.stderr, flush=True)
        return 2
    with process_group(_TIMEOUT_S) as world:
        report = examine(world, config, BRIEF if options.quick else THOROUGH)
        if world.rank == 0:
            show(report, world.world_size)
        sys.stdout.flush()
        if report.level == RED:
            # Peers may be gone and checks may hang in threads: leaving in order would wait for them.
            os._exit(1)
    return 0


def _load(files: Sequence[str], overrides: Sequence[str]) -> Config | None:
    return configuration.load(files, overrides) if files else None


def show(report: Report, ranks: int) -> None:
    """The table, and the JSON line."""
    table = Table(title=f"{ranks} ranks on {report.nodes} nodes")
    for name in ("", "check", "measured", "where", "remedy"):
        table.add_column(name, overflow="fold")
    for row in report.rows:
        where = ", ".join(row.where[:2]) + (f" and {len(row.where) - 2} more" if len(row.where) > 2 else "")
        table.add_row(row.level, row.check, row.value, where, row.remedy, style=row.level if row.remedy else "")
    Console(markup=False, highlight=False).print(table)
    print(json.dumps(json_report(report.rows, ranks, report.nodes)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
