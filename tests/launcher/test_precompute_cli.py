"""`twinflow data pack --precompute`: which program it starts, on how many ranks."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from launcher import cli


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []

    def module(*arguments: str) -> None:
        calls.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(cli, "_module", module)
    monkeypatch.setattr(cli.local, "count_gpus", lambda: 0)
    return calls


def pack(*arguments: str) -> int:
    return CliRunner().invoke(cli.app, ["data", "pack", "SOURCE", "DEST", *arguments]).exit_code


def test_without_it_nothing_needs_a_model(started: list[tuple[str, ...]]) -> None:
    assert pack("--min-side", "9") == 0
    assert started == [("data.pack", "SOURCE", "DEST", "--min-side", "9")]


def test_a_single_rank_needs_no_torchrun(started: list[tuple[str, ...]]) -> None:
    assert pack("--precompute", "c.yaml") == 0
    assert started == [("trainer.precompute", "SOURCE", "DEST", "--precompute", "c.yaml")]


def test_nproc_ranks_are_started_by_torchrun(started: list[tuple[str, ...]]) -> None:
    assert pack("--precompute=c.yaml", "--nproc", "3", "--dtype", "bfloat16") == 0
    ((module, *rest),) = started
    assert module == "torch.distributed.run" and rest[rest.index("--nproc-per-node") + 1] == "3"
    after = rest[rest.index("-m") :]
    assert after == ["-m", "trainer.precompute", "SOURCE", "DEST", "--precompute=c.yaml", "--dtype", "bfloat16"]


def test_one_rank_per_gpu_by_default(started: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.local, "count_gpus", lambda: 2)
    assert pack("--precompute", "c.yaml") == 0
    assert "2" in started[0] and "--nproc" not in started[0]


def test_a_number_of_ranks_that_is_none_is_refused(started: list[tuple[str, ...]]) -> None:
    assert pack("--precompute", "c.yaml", "--nproc", "many") == 2
    assert not started
