"""`twinflow parity CONFIG`: is a sharded step the step of one plain process? (issue: engines, law 9)

The user's configuration with the tiny model of its backbone: losses, gradient norm and every gradient of one step under
each combination of engine, ranks, accumulation, activation checkpointing and packing, against one float64 process that
knows no engine and packs nothing. Runs on the CPU over gloo. A table row per combination, then one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from configs import load as configuration
from configs.schema import Config
from models import tiny
from trainer.parity_step import Case, Measured, Subject, reference, sharded
from trainer.ranks import RankFailedError, run_ranks, stop_ranks
from trainer.sameness import errors
from trainer.train import check_package

BARS = {"float64": 1e-12, "float32": 1e-5}
ROWS = 48
"""Samples of the global batch: a multiple of ranks x accumulation for all combinations."""
TIMEOUT_S = 300.0
HEAD = ("engine", "dtype", "ranks", "accum", "recompute", "passes", "loss", "grad norm", "gradient", "worst tensor")
FORMAT = "{:>7} {:7} {:8}{:>5}{:>6} {:9} {:8}{:>9}{:>10}{:>9}  {}"


class ParityRefused(RuntimeError):
    """The configuration has no tiny twin; the message says what has."""


@dataclass
class Verdict:
    """One row. worst: check -> (error, tensor or loss term); problem: why there is no result."""

    case: Case
    worst: dict[str, tuple[float, str]]
    problem: str = ""

    @property
    def bar(self) -> float:
        return BARS[self.case.dtype]

    @property
    def failed(self) -> list[str]:
        """Checks that miss the bar; NaN does."""
        return [check for check, (error, _) in self.worst.items() if not error <= self.bar]

    @property
    def ok(self) -> bool:
        return not self.problem and not self.failed


def cases(quick: bool) -> list[Case]:
    """All combinations; `quick` keeps two ranks and the two opposite settings of the other switches."""
    found = []
    layouts = [("fsdp2", 1, 1), ("fsdp2", 2, 1), ("fsdp2", 3, 1), ("fsdp2", 4, 2)]
    layouts += [("zero3", ranks, 1) for ranks in (1, 2, 3)]
    for engine, ranks, replicate in layouts:
        # DeepSpeed knows no float64.
        for dtype in BARS if engine == "fsdp2" else ("float32",):
            for accumulation, checkpointing, packed in itertools.product((1, 4), (False, True), (True, False)):
                case = Case(engine, ranks, dtype, accumulation, checkpointing, packed, replicate)
                opposite = (accumulation, checkpointing, packed) in ((1, False, False), (4, True, True))
                if not quick or (ranks == 2 and opposite):
                    found.append(case)
    return found


def judge(case: Case, found: Measured, expected: Measured) -> Verdict:
    """Law 9 for the gradients; losses and norm relative to the reference's loss and norm."""
    try:
        gradients = errors(found.gradients, expected.gradients)
    except ValueError as error:
        return Verdict(case, {}, f"gradients: {error}")
    scale = max(abs(expected.losses["loss"]), 1e-3)
    if found.losses.keys() != expected.losses.keys():
        return Verdict(case, {}, f"loss: terms {sorted(found.losses.keys() ^ expected.losses.keys())} differ")
    terms = {name: abs(found.losses[name] - value) / scale for name, value in expected.losses.items()}
    norm = abs(found.grad_norm - expected.grad_norm) / expected.grad_norm
    return Verdict(case, {"loss": _worst(terms), "grad_norm": (norm, ""), "gradient": _worst(gradients)})


def _worst(named: dict[str, float]) -> tuple[float, str]:
    name = max(named, key=lambda key: named[key] if named[key] == named[key] else float("inf"))
    return named[name], name


def explain(found: Measured, expected: Measured, bar: float) -> str:
    """What all gradients have in common: one wrong factor, or how many of them are wrong."""
    pairs = [(found.gradients[name].double(), gradient.double()) for name, gradient in expected.gradients.items()]
    squares = sum(float(b.square().sum()) for _, b in pairs)
    factor = sum(float((a * b).sum()) for a, b in pairs) / squares
    left = sum(float((a - factor * b).square().sum()) for a, b in pairs)
    if (left / squares) ** 0.5 <= 10 * bar and factor:
        return f"every gradient is {factor:.6g} times the reference's: a wrong divide or a wrong count"
    wrong = [name for name, error in errors(found.gradients, expected.gradients).items() if not error <= bar]
    return f"{len(wrong)} of {len(pairs)} gradients are wrong: {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}"


def examine(subject: Subject, case: Case, expected: Measured) -> tuple[Verdict, str]:
    """Run one combination; its verdict and, where it fails, an explanation."""
    try:
        found = run_ranks(sharded, case.ranks, subject, case, timeout=TIMEOUT_S)[0]
    except (RankFailedError, TimeoutError) as error:
        return Verdict(case, {}, str(error).strip().splitlines()[-1]), str(error)
    verdict = judge(case, found, expected)
    if verdict.ok:
        return verdict, ""
    return verdict, verdict.problem or explain(found, expected, verdict.bar)


def table(subject: Subject, chosen: Sequence[Case]) -> list[Verdict]:
    """Examine all combinations, one printed row each as it is done."""
    expected = {dtype: reference(subject, dtype) for dtype in BARS}
    rounding = _worst(errors(expected["float32"].gradients, expected["float64"].gradients))[0]
    count = len(expected["float64"].gradients)
    print(f"Errors of one step ({subject.rows} samples, {count} gradients) against one float64 process without engine;")
    print(
        f"bars: float64 {BARS['float64']:g}, float32 {BARS['float32']:g}. Float32 rows: times and their sinusoids are"
    )
    print(f"float32 in the reference, too (they alone change its gradients by {rounding:.1e}).\n")
    print(FORMAT.format("", *HEAD), flush=True)
    verdicts = []
    for index, case in enumerate(chosen, start=1):
        verdict, explanation = examine(subject, case, expected[case.dtype])
        verdicts.append(verdict)
        shown = [
            f"{verdict.worst[check][0]:.0e}" if verdict.worst else "-" for check in ("loss", "grad_norm", "gradient")
        ]
        end = verdict.worst["gradient"][1] if verdict.worst else ""
        if not verdict.ok:
            end = f"FAILED {', '.join(_named(verdict))}: {explanation}"
        switches = ("yes" if case.checkpointing else "no", "packed" if case.packed else "unpacked")
        row = (case.name, case.dtype, case.ranks, case.accumulation, *switches, *shown, end)
        print(FORMAT.format(f"{index}/{len(chosen)}", *row), flush=True)
    return verdicts


def _named(verdict: Verdict) -> list[str]:
    """Failed checks, each with what is worst in it."""
    return [f"{check} ({verdict.worst[check][1]})".replace(" ()", "") for check in verdict.failed] or ["to run"]


def summary(config: Config, verdicts: Sequence[Verdict], seconds: float) -> dict[str, object]:
    """The JSON line. worst: by engine and dtype the largest gradient error and its tensor."""
    worst: dict[str, dict[str, object]] = {}
    for verdict in verdicts:
        key, found = f"{verdict.case.name} {verdict.case.dtype}", verdict.worst.get("gradient")
        if found and (key not in worst or not found[0] <= float(str(worst[key]["error"]))):
            worst[key] = {"error": found[0], "tensor": found[1]}
    failed = [
        {"case": str(v.case), "problem": v.problem}
        | {check: {"error": v.worst[check][0], "tensor": v.worst[check][1]} for check in v.failed}
        for v in verdicts
        if not v.ok
    ]
    return {
        "check": "parity",
        "run": config.run.name,
        "model": config.model["name"],
        "objective": config.objective["name"],
        "combinations": len(verdicts),
        "worst": worst,
        "failed": failed,
        "seconds": round(seconds, 1),
        "ok": not failed and bool(verdicts),
    }


def tiny_folder(model: str, folder: Path) -> str:
    """Write the smallest model of a backbone.

    Raises:
        ParityRefused: there is none.
    """
    disable_progress_bar()
    if model not in tiny.SMALLEST:
        raise ParityRefused(f"model.name={model} has no tiny twin; parity knows {', '.join(sorted(tiny.SMALLEST))}")
    tiny.write(folder, tiny.SMALLEST[model], seed=0)
    return str(folder)


def main(arguments: list[str] | None = None) -> int:
    check_package()
    parser = argparse.ArgumentParser(prog="python -m trainer.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, action="append", help="YAML file; several are merged left to right")
    parser.add_argument("--quick", action="store_true", help="two ranks and a quarter of the combinations")
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of the ranks: torch's words to DeepSpeed
    begin = time.monotonic()
    try:
        config = configuration.load(options.config, options.overrides)
        with tempfile.TemporaryDirectory(prefix="twinflow-parity-") as folder:
            subject = Subject(config, tiny_folder(config.model["name"], Path(folder) / "model"), ROWS)
            verdicts = table(subject, cases(options.quick))
    except (configuration.ConfigError, ParityRefused) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        stop_ranks()
    result = summary(config, verdicts, time.monotonic() - begin)
    print(f"\n{json.dumps(result)}")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
