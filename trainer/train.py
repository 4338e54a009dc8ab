"""Entry of every rank: python -m trainer.train --config FILE... [key=value]..., started by torchrun (launcher/local.py).

Loader processes import this module again as their main module: what is heavy is imported in main().
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trainer.signals import StopRequest


def main(arguments: list[str] | None = None) -> int:
    check_package()
    parser = argparse.ArgumentParser(prog="python -m trainer.train", description=__doc__)
    parser.add_argument("--config", required=True, action="append", help="YAML file; several are merged left to right")
    parser.add_argument("--fresh", action="store_true", help="start a new run beside an existing one")
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY", help="accept a changed identity key"
    )
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args(arguments)
    stop = StopRequest().install()

    from trainer import session

    return session.main(options.config, options.overrides, stop, options.fresh, options.allow_change)


def check_package() -> None:
    """Other packages install a top-level `trainer` too; with the root on PYTHONPATH ours wins."""
    expected = Path(__file__).resolve().parent
    found = Path(sys.modules["trainer"].__file__ or "").resolve().parent
    if found != expected:
        raise SystemExit(
            f"the package `trainer` is {found}, not {expected}: start from the project's root with PYTHONPATH set"
        )


if __name__ == "__main__":
    sys.exit(main())
