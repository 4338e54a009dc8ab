"""`twinflow sample` and `export`: which program they start, on how many ranks, and who explains the options."""

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


def twinflow(*arguments: str) -> int:
    return CliRunner().invoke(cli.app, list(arguments)).exit_code


def test_a_single_rank_samples_without_torchrun(started: list[tuple[str, ...]]) -> None:
    assert twinflow("sample", "RUN", "--prompts", "p.txt", "--preset", "4nfe") == 0
    assert started == [("trainer.generate.draw", "RUN", "--prompts", "p.txt", "--preset", "4nfe")]


def test_nproc_ranks_sample_together(started: list[tuple[str, ...]]) -> None:
    assert twinflow("sample", "RUN", "--nproc", "2", "--prompts", "p.txt") == 0
    ((module, *rest),) = started
    assert module == "torch.distributed.run" and rest[rest.index("--nproc-per-node") + 1] == "2"
    assert rest[rest.index("-m") :] == ["-m", "trainer.generate.draw", "RUN", "--prompts", "p.txt"]


def test_export_is_one_process(started: list[tuple[str, ...]]) -> None:
    assert twinflow("export", "RUN", "DEST", "--weights", "online") == 0
    assert started == [("trainer.export", "RUN", "DEST", "--weights", "online")]


@pytest.mark.parametrize(("verb", "module"), [("sample", "trainer.generate.draw"), ("export", "trainer.export")])
def test_help_is_the_modules_own(verb: str, module: str, started: list[tuple[str, ...]]) -> None:
    assert twinflow(verb, "--help") == 0
    assert started == [(module, "--help")]
