from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from configs import load
from launcher import cli
from launcher.cli import app

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "250"})


VERBS = [(), ("train",), ("doctor",), ("config",), ("model", "tiny"), ("config", "diff")]
DATA_VERBS = [("data", name) for name in ("demo", "pack", "index", "verify")]


CHECKPOINT_VERBS = [("checkpoint", name) for name in ("ls", "diff", "verify")]


@pytest.mark.parametrize("verb", [*VERBS, *DATA_VERBS, *CHECKPOINT_VERBS])
def test_every_verb_has_help(verb: tuple[str, ...]) -> None:
    result = invoke(*verb, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_check_says_ok_or_what_is_wrong() -> None:
    assert "ok: run smoke" in invoke("config", "check", SMOKE).output
    result = invoke("config", "check", SMOKE, "train.stps=1")
    assert result.exit_code == 2 and "did you mean train.steps" in result.output


def test_show_lists_every_knob_with_type_default_and_meaning() -> None:
    output = invoke("config", "show", SMOKE).output
    for key in (
        "train.steps",
        "objective.order",
        "engine.block_dtype",
        "model.latents",
        "optimizer.betas",
        "guidance.scale",
    ):
        assert key in output
    assert "Seed of the sample order" in output and "required" in output
    assert "dict[str, int]" in output and "Longest caption [tokens]" in output
    assert "steps: 7" in invoke("config", "show", SMOKE, "train.steps=7", "schedule.warmup_steps=1", "--yaml").output


def test_diff_marks_what_defines_the_experiment(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(Path(SMOKE).read_text().replace("order: 2", "order: 1").replace("threads: 1", "threads: 2"))
    output = invoke("config", "diff", SMOKE, str(other)).output
    assert "the experiment" in output and "circumstances" in output
    assert "no difference" in invoke("config", "diff", SMOKE, SMOKE).output


def test_train_refuses_a_folder_of_something_else_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    result = invoke("train", SMOKE, f"run.dir={tmp_path}")
    assert result.exit_code == 2 and "not a run of this trainer" in result.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_ranks_get_what_the_user_wrote_and_not_the_redacted_copy(tmp_path: Path) -> None:
    settings = [SMOKE, "tracking.uri=https://me:hunter2@host/x"]
    folder = tmp_path / "it's: [here]"
    job = cli.training_job(load.load(settings[:1], settings[1:]), settings, ["train.steps"], folder, tmp_path)
    files, overrides = list(job.arguments[1:2]), list(job.arguments[4:])
    assert job.arguments[0] == "--config" and job.arguments[2:4] == ("--allow-change", "train.steps")
    config = load.load(files, overrides)
    assert config.tracking.uri == "https://me:hunter2@host/x" and config.run.dir == str(folder)
    assert (job.nproc, job.threads) == (2, 1)


def test_the_command_to_go_on_names_the_folder_that_fresh_chose() -> None:
    config = load.load([SMOKE])
    assert cli.resume_command(config, ["a b.yaml"], Path("outputs/smoke")) == "twinflow train 'a b.yaml'"
    assert cli.resume_command(config, ["a.yaml"], Path("outputs/smoke-2")).endswith("a.yaml run.dir=outputs/smoke-2")


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("train", SMOKE, f"run.dir={tmp_path}/file/run")
    assert result.exit_code == 2 and "Not a directory" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("verb", [("pack", "absent"), ("index",), ("verify",)])
def test_data_verbs_pass_arguments_and_exit_status_on(
    verb: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, *first = verb
    # An option before the places must not take one of them.
    result = invoke("data", name, "--workers", "0", *first, str(tmp_path / "nowhere"))
    error = capfd.readouterr().err
    assert result.exit_code == 1 and "error: " in error and (first or [str(tmp_path / "nowhere")])[0] in error
    assert invoke("data", name, "x", "y", "--misspelt").exit_code == 2


def test_parity_starts_the_check_with_what_the_user_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []

    def record(*words: str) -> None:
        started.append(words)

    monkeypatch.setattr(cli, "_module", record)
    assert invoke("parity", SMOKE, "--quick", "objective.order=1").exit_code == 0
    assert started == [("trainer.parity", "--config", SMOKE, "--quick", "objective.order=1")]
    assert invoke("parity", SMOKE, "objective.ordr=1").exit_code == 2 and len(started) == 1


@pytest.mark.parametrize("verb", [("ls",), ("verify",), ("diff", "absent")])
def test_checkpoint_verbs_pass_arguments_and_exit_status_on(
    verb: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, *first = verb
    result = invoke("checkpoint", name, *first, str(tmp_path / "nowhere"))
    error = capfd.readouterr().err
    assert result.exit_code == 2 and "error: " in error and (first or [str(tmp_path / "nowhere")])[0] in error
