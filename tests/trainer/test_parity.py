"""`twinflow parity`: right engines pass, and every planted fault fails with the check and the tensor named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import load
from models import tiny
from tests.trainer import parity_faults
from trainer import parity, parity_step
from trainer.parity_step import Case, Measured, Subject

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
CASE = Case("fsdp2", ranks=2, dtype="float64", accumulation=4, checkpointing=True)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    config = load.load([SMOKE], ["objective.teacher=ema", "guidance.scale=2"])
    folder = parity.tiny_folder("qwen_image", tmp_path_factory.mktemp("parity") / "model")
    return Subject(config, folder, rows=16)


@pytest.fixture(scope="module")
def expected(subject: Subject) -> Measured:
    return parity_step.reference(subject, "float64")


def _examine(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, case: Case, expected: Measured, step: Callable[..., Any]
) -> tuple[parity.Verdict, str]:
    monkeypatch.setattr(parity, "sharded", step)
    return parity.examine(subject, case, expected)


def test_a_separate_teacher_with_guidance_passes_on_copies_of_shards(subject: Subject, expected: Measured) -> None:
    case = replace(CASE, ranks=4, replicate=2, accumulation=1)
    verdict, explanation = parity.examine(subject, case, expected)
    assert verdict.ok, (verdict, explanation)
    assert set(verdict.worst) == {"loss", "grad_norm", "gradient"}
    assert len(expected.gradients) == 75 and len(expected.losses) > 2
    # Only the text queries of the last block have none: their output is discarded.
    zero = {name for name, gradient in expected.gradients.items() if not gradient.any()}
    last = "transformer_blocks.1.attn."
    assert zero == {f"{last}add_q_proj.weight", f"{last}add_q_proj.bias", f"{last}norm_added_q.weight"}


@pytest.mark.parametrize(
    ("fault", "failed", "words"),
    [
        ("wrong_sign", ["grad_norm", "gradient"], "of 75 gradients are wrong"),
        ("detached_times", ["grad_norm", "gradient"], "gradients are wrong: time_text_embed"),
        ("divided_by_ranks", ["grad_norm", "gradient"], "every gradient is 0.5 times the reference's"),
        ("divided_by_accumulation", ["grad_norm", "gradient"], "every gradient is 0.25 times the reference's"),
        ("dropped_mask", ["loss", "grad_norm", "gradient"], "of 75 gradients are wrong"),
    ],
)
def test_a_planted_fault_fails_by_name(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, expected: Measured, fault: str, failed: list[str], words: str
) -> None:
    verdict, explanation = _examine(monkeypatch, subject, CASE, expected, getattr(parity_faults, fault))
    assert not verdict.ok and not verdict.problem
    assert set(failed) <= set(verdict.failed)
    assert verdict.worst["gradient"][1] in expected.gradients
    assert words in explanation
    report = parity.summary(subject.config, [verdict], 1.0)
    assert report["ok"] is False
    assert json.loads(json.dumps(report))["failed"][0]["gradient"]["tensor"] == verdict.worst["gradient"][1]


@pytest.mark.parametrize(
    ("options", "case", "count"),
    [
        (["objective.teacher=ema", "lora.alpha=2"], CASE, 50),
        (["objective.teacher=frozen", "lora.variant=single_time"], replace(CASE, ranks=1, accumulation=1), 46),
        (["objective.teacher=ema"], Case("zero3", ranks=2, dtype="float32", checkpointing=True), 50),
    ],
    ids=["averages", "base", "zero3"],
)
def test_adapters_tell_the_rows_of_one_pass_apart(subject: Subject, options: list[str], case: Case, count: int) -> None:
    """Packed: online rows and the teacher's in one pass. The reference: one kind at a time, the base a model without
    adapters, asked at t."""
    config = load.load([SMOKE], ["lora.rank=4", "guidance.scale=2", *options])
    adapted = replace(subject, config=config)
    expected = parity_step.reference(adapted, case.dtype)
    assert len(expected.gradients) == count and all("lora" in name for name in expected.gradients)
    verdict, explanation = parity.examine(adapted, case, expected)
    assert verdict.ok, (verdict, explanation)


@pytest.mark.parametrize("model", ["sana", "sd3", "z_image"])
def test_adapters_tell_rows_apart_in_every_backbone(model: str, tmp_path: Path) -> None:
    options = [f"model.name={model}", "lora.rank=3", "guidance.scale=2", "objective.teacher=frozen"]
    adapted = Subject(load.load([SMOKE], options), parity.tiny_folder(model, tmp_path / "model"), rows=16)
    case = replace(CASE, ranks=1, accumulation=1)
    verdict, explanation = parity.examine(adapted, case, parity_step.reference(adapted, case.dtype))
    assert verdict.ok, (verdict, explanation)


def test_a_parameter_without_gradient_is_named_by_the_engine(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, expected: Measured
) -> None:
    verdict, explanation = _examine(monkeypatch, subject, CASE, expected, parity_faults.idle_time_embedding)
    assert not verdict.ok and "got no gradient" in verdict.problem
    assert "time_text_embed" in explanation


@pytest.mark.parametrize("model", sorted(tiny.SMALLEST.keys() - {"qwen_image"}))
def test_every_backbone_passes(model: str, tmp_path: Path) -> None:
    config = load.load([SMOKE], [f"model.name={model}", "guidance.scale=2"])
    subject = Subject(config, parity.tiny_folder(model, tmp_path / "model"), rows=16)
    for case in (CASE, Case("zero3", ranks=2, dtype="float32", accumulation=4, checkpointing=True)):
        verdict, explanation = parity.examine(subject, case, parity_step.reference(subject, case.dtype))
        assert verdict.ok, (verdict, explanation)


def test_a_missing_tensor_and_nan_are_failures(expected: Measured) -> None:
    lost = dict(expected.gradients)
    name = next(iter(lost))
    del lost[name]
    assert name in parity.judge(CASE, replace(expected, gradients=lost), expected).problem
    broken = {n: torch.full_like(g, float("nan")) if n == name else g for n, g in expected.gradients.items()}
    verdict = parity.judge(CASE, replace(expected, gradients=broken), expected)
    assert verdict.failed == ["gradient"] and verdict.worst["gradient"][1] == name


def test_the_table_covers_every_combination_and_quick_a_part() -> None:
    full, quick = parity.cases(False), parity.cases(True)
    assert set(quick) < set(full) and len(set(full)) == len(full)
    names = {case.name for case in full}
    assert names == {"fsdp2", "zero3", "hsdp"} == {case.name for case in quick} | {"hsdp"}
    for name in names:
        of_engine = [case for case in full if case.name == name]
        assert {case.ranks for case in of_engine} == ({4} if name == "hsdp" else {1, 2, 3})
        assert {case.dtype for case in of_engine} == ({"float32"} if name == "zero3" else {"float64", "float32"})
        switches = {(case.accumulation, case.checkpointing, case.packed) for case in of_engine}
        assert len(switches) == 8
    assert all(parity.ROWS % (case.ranks * case.accumulation) == 0 for case in full)


@pytest.mark.slow
def test_the_command_prints_a_table_and_one_json_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [replace(CASE, dtype="float32"), Case("zero3", ranks=2, dtype="float32", packed=False)]
    monkeypatch.setattr(parity, "cases", lambda quick: chosen)
    monkeypatch.setattr(parity, "ROWS", 16)
    assert parity.main(["--config", SMOKE, "--quick"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])
    assert result["ok"] and result["combinations"] == 2 and result["failed"] == []
    assert set(result["worst"]) == {"fsdp2 float32", "zero3 float32"}
    assert sum(line.lstrip().startswith(("1/2 fsdp2", "2/2 zero3")) for line in lines) == 2


def test_a_refused_configuration_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--config", SMOKE, "train.step=3"]) == 2
    assert "did you mean train.steps" in capsys.readouterr().err


def test_a_backbone_without_a_tiny_twin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(parity.ParityRefused, match="parity knows qwen_image"):
        parity.tiny_folder("unknown", tmp_path)
