"""The launcher against real torchrun and small stand-ins for a rank."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher import local
from launcher.job import Job
from launcher.report import report

ROOT = Path(__file__).parents[2]


def job(folder: Path, what: str, **more: int) -> Job:
    arguments = (str(folder), what)
    log_dir = folder / "logs" / "x"
    return Job("tests.launcher.stand_in", arguments, nproc=2, threads=1, log_dir=log_dir, root=ROOT, **more)


def run_and_report(folder: Path, what: str) -> int:
    (folder / "logs").mkdir(exist_ok=True)
    with local.sole_owner(folder) as lock:
        outcome = local.Runner(job(folder, what), lock).run()
    return report(outcome, job(folder, what), folder, "twinflow train x.yaml")


def in_a_process(folder: Path, what: str) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path; from tests.launcher.test_local import run_and_report;"
        f"sys.exit(run_and_report(Path({str(folder)!r}), {what!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "up_1").exists() or not (folder / "up_0").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def ranks(folder: Path) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"tests.launcher.stand_in {folder}"], capture_output=True, text=True)
    return [
        int(pid)
        for pid in found.stdout.split()
        if b"torch.distributed" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_a_clean_end_shows_rank_0_and_where_the_results_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(tmp_path, "finish") == 0
    said = capfd.readouterr().out
    assert "rank 0 is up" in said and "rank 1 is up" not in said
    assert "finished at 7" in said and "a.png" in said and "ck" in said
    log = local.rank_log(tmp_path / "logs" / "x", 1, "stdout")
    assert log is not None and "rank 1 is up" in log.read_text()


def test_a_rank_that_raises_is_named_with_its_last_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_and_report(tmp_path, "raise") == 1
    said = capfd.readouterr().err
    assert "rank 1 ended with exit code 1" in said
    assert "the shard digits-000003.tar is missing" in said
    assert "ChildFailedError" not in said


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = in_a_process(tmp_path, "stop")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=40)[0]
    assert process.returncode == 130, said
    assert "stopped and saved" in said and "go on with: twinflow train x.yaml" in said


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_although_the_other_hangs(tmp_path: Path) -> None:
    process = in_a_process(tmp_path, "deaf")
    began = time.monotonic()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in ranks(tmp_path)}
    (victim,) = [pid for pid, text in environments.items() if b"LOCAL_RANK=1" in text]
    os.kill(victim, signal.SIGKILL)
    said = process.communicate(timeout=40)[0]
    assert time.monotonic() - began < 30
    assert process.returncode == 1 and "rank 1 was killed by SIGKILL" in said
    assert ranks(tmp_path) == []


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path) -> None:
    process = in_a_process(tmp_path, "deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 130 and "without saving" in said
    assert ranks(tmp_path) == []


def test_ranks_that_a_killed_torchrun_leaves_behind_are_ended(tmp_path: Path) -> None:
    process = in_a_process(tmp_path, "deaf")
    time.sleep(2 * local.LOOK_S)
    (torchrun,) = psutil.Process(process.pid).children()
    torchrun.kill()
    process.communicate(timeout=20)
    assert process.returncode == 1
    assert ranks(tmp_path) == []


def test_a_killed_launcher_leaves_its_folder_locked_and_says_who_holds_it(tmp_path: Path) -> None:
    process = in_a_process(tmp_path, "stop")
    (torchrun,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    with (
        pytest.raises(local.LaunchError, match=rf"torchrun {torchrun.pid} on .*; a SIGTERM makes it save and stop"),
        local.sole_owner(tmp_path),
    ):
        pass
    torchrun.terminate()
    psutil.wait_procs([torchrun], timeout=40)
    assert '"stopped"' in (tmp_path / "status.json").read_text()
    with local.sole_owner(tmp_path):
        pass
    assert ranks(tmp_path) == []


def test_a_used_port_is_one_clear_message(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(local.LaunchError, match=rf"port {port} \(runtime\.port\) is in use"):
            local.Runner(job(tmp_path, "finish", port=port)).run()


def test_a_closed_terminal_is_a_request_to_stop(tmp_path: Path) -> None:
    process = in_a_process(tmp_path, "stop")
    assert process.stdout is not None
    process.stdout.close()  # nobody reads what it says any more
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=40)
    assert '"stopped"' in (tmp_path / "status.json").read_text()
    assert ranks(tmp_path) == []


def test_characters_cut_by_a_read_arrive_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = local.Runner(job(tmp_path, "finish"))
    path = tmp_path / "logs" / "x" / "none_a" / "attempt_0" / "0" / "stdout.log"
    path.parent.mkdir(parents=True)
    bar = "5%|█▏ |\r".encode()
    for end in range(len(bar)):
        path.write_bytes(bar[: end + 1])
        runner._show_rank_0()
    assert capsys.readouterr().out == bar.decode()


def test_a_run_in_training_is_not_started_twice(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with (
        local.sole_owner(tmp_path),
        pytest.raises(local.LaunchError, match="is being trained by another process"),
        local.sole_owner(tmp_path),
    ):
        pass
    with local.sole_owner(tmp_path):
        pass


def test_gpus_are_counted_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in (("0,1,3", 3), ("", 0), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert local.count_gpus() == count
