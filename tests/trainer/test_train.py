"""`twinflow train` as a user runs it: two real ranks, interrupted and killed, ends where one quiet run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STEPS = 9


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digit shards and the tiny model, made by the verbs that a user calls."""
    path = tmp_path_factory.mktemp("assets")
    for verb in (("data", "demo", path / "digits"), ("model", "tiny", path / "model", "--preset", "digits")):
        made = subprocess.run([*TWINFLOW, *map(str, verb)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
    return path


TWINFLOW = [sys.executable, "-m", "launcher.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(assets: Path, run: Path, *more: str) -> list[str]:
    settings = {
        "run.name": "test",
        "run.dir": run,
        "model.path": assets / "model",
        "data.manifest": assets / "digits/train",
        "data.held_out": assets / "digits/heldout",
        "train.steps": STEPS,
        "train.global_batch_size": 16,
        "train.micro_batch_size": 4,
        "schedule.warmup_steps": 2,
        "checkpoint.every": 2,
        "tracking.uri": f"sqlite:///{run.parent}/mlflow.db",
        "tracking.every": 1,
        "tracking.held_out_every": 4,
        "sample.presets": "[1nfe]",
        "sample.columns": 2,
        "evaluate.presets": "[1nfe]",
        "evaluate.images": 20,
    }
    return [*TWINFLOW, "train", "configs/smoke.yaml", *(f"{key}={value}" for key, value in settings.items()), *more]


def start(assets: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(assets, run, *more),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def logged_steps(run: Path) -> int:
    """The last step with metrics in the journal."""
    path = run / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max([json.loads(line).get("step", 0) for line in lines if line.endswith("}")], default=0)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def worker_pid(run: Path, local_rank: int) -> int:
    """The process of a rank of the run whose torchrun logs lie in its folder."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            arguments = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        ours = str(run).encode() in arguments and b"trainer.train" in arguments
        if ours and f"LOCAL_RANK={local_rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"no process of rank {local_rank}")


def final_tensors(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step_{STEPS:08d}"
    files = sorted(folder.glob("*.safetensors"))
    return {
        f"{file.name}/{name}": tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()
    }


def final_counters(run: Path) -> dict[str, float]:
    """Scalars of the state; the time that was spent is another one."""
    certificate = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "certificate.json").read_text())
    return {name: value for name, value in certificate["counters"].items() if name != "training_seconds"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_interrupted_and_resumed_ends_bit_equal(assets: Path, tmp_path: Path) -> None:
    quiet, troubled = tmp_path / "quiet", tmp_path / "troubled"
    first = start(assets, quiet)
    said = first.communicate(timeout=240)[0]
    assert first.returncode == 0, said
    assert "finished" in said and "mlflow ui --backend-store-uri" in said

    process = start(assets, troubled)
    wait_for(lambda: logged_steps(troubled) >= 3, process)
    began = time.monotonic()
    os.kill(worker_pid(troubled, 1), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 30
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in said

    process = start(assets, troubled)
    wait_for(lambda: logged_steps(troubled) >= 5, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert json.loads((troubled / "status.json").read_text())["state"] == "stopped"

    process = start(assets, troubled)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    expected, found = final_tensors(quiet), final_tensors(troubled)
    assert expected.keys() == found.keys() and expected
    assert [name for name in expected if expected[name] != found[name]] == []
    assert final_counters(quiet) == final_counters(troubled)
    assert final_counters(quiet)["collapse_checks"] == 2

    summary = json.loads((troubled / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == STEPS and summary["engine"] == "fsdp2"
    assert {"accuracy", "fd_pca", "fd_net", "div", "nn"} <= summary["nfe1"].keys()
    passes = summary["passes_per_step"]
    assert (passes["no_grad"], passes["graded"], passes["rows_graded"]) == (2.0, 2.0, 8.0)
    assert (troubled / "pictures" / f"1nfe_step{STEPS:08d}.png").exists()

    again = start(assets, troubled)
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0 and "finished already" in said


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_is_stopped_for_good_ends_the_run_with_stacks(assets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    budgets = "runtime.hang_timeout_s=4", "runtime.hang_first_timeout_s=30"
    process = start(assets, run, "train.steps=100000", "data.workers=0", "tracking.held_out_every=0", *budgets)
    wait_for(lambda: logged_steps(run) >= 3, process)
    os.kill(worker_pid(run, 1), signal.SIGSTOP)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "rank 0 ended with exit code 75" in said
    assert "the run hangs: rank 0 made no progress" in said and "rank 1 is silent (last seen in stage" in said
    stacks = next((run / "logs").rglob("attempt_0/0/stderr.log")).read_text()
    assert "stacks of rank 0" in stacks and "in fit" in stacks
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["vain"]) == ("failed", False)


@pytest.mark.parametrize(
    "mistake, expected",
    [
        ("train.stps=3", "did you mean train.steps"),
        ("train.micro_batch_size=5", "train.micro_batch_size=4"),
        ("data.manifest=nowhere", "nowhere"),
        ("objective.order=-1", "objective.order"),
    ],
)
@pytest.mark.timeout(120)
def test_a_mistake_is_one_clear_message(assets: Path, tmp_path: Path, mistake: str, expected: str) -> None:
    done = start(assets, tmp_path / "run", mistake)
    said = done.communicate(timeout=100)[0]
    assert done.returncode != 0
    assert expected in said
    assert "Traceback" not in said
