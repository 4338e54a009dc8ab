"""Small real runs under a real SLURM: two nodes of one rank each, submitted as `twinflow submit` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file

from configs import load
from configs.clusters import Cluster
from launcher import scheduler, submit
from launcher.chain import Chain
from launcher.local import read_status
from launcher.status import stop
from launcher.submit import Request
from tests.launcher.slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
ENDS = ("finished", "stopped", "failed")


def make_assets(folder: Path) -> Path:
    """Digit shards, the tiny model, and an MLflow data base that is ready: making one takes seconds of each run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
    for command in (
        ("-m", "data.demo", folder / "digits"),
        ("-m", "models.tiny", folder / "model", "--preset", "digits"),
        ("-c", code, f"sqlite:///{folder}/mlflow.db"),
    ):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder


@dataclass
class SlurmRun:
    """One run in its own folder. steps: optimizer steps; trouble: of tests.launcher.troubled_train; pace_s: least
    seconds of a step; cluster: as a person would configure it."""

    slurm: SlurmCluster
    assets: Path
    folder: Path
    steps: int = 12
    trouble: str = "none:0"
    pace_s: float = 0.1
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def experiment(self) -> str:
        """MLflow's name, a run's own: tests share one database."""
        return f"{self.folder.parent.name}-{self.folder.name}"

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.trouble"

    def settings(self) -> dict[str, object]:
        return {
            "run.name": self.folder.name,
            "run.dir": self.folder,
            "model.path": self.assets / "model",
            "data.manifest": self.assets / "digits/train",
            "data.held_out": "null",
            "data.workers": 0,
            "train.steps": self.steps,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 4,
            "schedule.warmup_steps": 2,
            "checkpoint.every": 3,
            "checkpoint.keep_last": 2,
            "tracking.uri": f"sqlite:///{self.assets}/mlflow.db",
            "tracking.experiment": self.experiment,
            "tracking.every": 1,
            "tracking.held_out_every": 0,
            "sample.presets": "[]",
            "evaluate.name": "null",
            "runtime.nproc": 1,
            "runtime.collective_timeout_s": 60,
        }

    def submit(self) -> str:
        """Queue it; the job's id."""
        overrides = [f"{key}={value}" for key, value in self.settings().items()]
        files = [str(ROOT / "configs" / "smoke.yaml")]
        environment = {
            "TROUBLE": self.trouble,
            "TROUBLE_LOG": str(self.log),
            "PACE_S": str(self.pace_s),
            **self.cluster.environment,
        }
        base = {"nodes": 2, "gpus_per_node": 0, "time": "30", "grace_s": 60, "scratch": str(self.folder.parent)}
        place = replace(self.cluster, **base, environment=environment)
        with self.here():
            request = Request(load.load(files, overrides), files, overrides, (), self.folder, place)
            submit.refuse_impossible(request)
            job = replace(submit.plan(request, ROOT), module="tests.launcher.troubled_train")
            return submit.submit(submit.write(job, files, ROOT))

    def here(self) -> mock._patch_dict:
        """Clients of this process talk to the test's cluster."""
        return mock.patch.dict(os.environ, self.slurm.environment)

    def stop(self) -> str:
        with self.here():
            return stop(self.folder)

    def chain(self) -> Chain:
        chain = Chain.read(self.folder)
        assert chain is not None
        return chain

    def steps_done(self) -> int:
        path = self.folder / "journal.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max([json.loads(line).get("step", 0) for line in lines if line.endswith("}")], default=0)

    def until(self, reached: Callable[[], bool], what: str, seconds: float = 150.0) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{self.words()}"
            assert self.chain().state not in ENDS or reached(), f"the chain ended before {what}\n{self.words()}"
            time.sleep(0.2)

    def wait(self, seconds: float = 240.0) -> Chain:
        """Until the chain has ended and SLURM has forgotten the job."""
        deadline = time.monotonic() + seconds
        while self.chain().state not in ENDS:
            assert time.monotonic() < deadline, f"the chain has not ended within {seconds:.0f} s\n{self.words()}"
            time.sleep(0.2)
        with self.here():
            while scheduler.alive(scheduler.job(self.chain().job)):
                assert time.monotonic() < deadline, self.words()
                time.sleep(0.2)
        return self.chain()

    def words(self) -> str:
        """Everything that was said, for a failing test."""
        files = [
            path for pattern in ("*.log", "*/srun.log", "**/stderr.log") for path in self.folder.glob(f"logs/{pattern}")
        ]
        return "\n".join(
            f"--- {path}\n{path.read_text(errors='replace')[-1500:]}" for path in files if path.stat().st_size
        )

    def parameters(self) -> Mapping[str, bytes]:
        """All tensors of the last checkpoint, by file and name."""
        folder = self.folder / "checkpoints" / f"step_{self.steps:08d}"
        files = sorted(folder.glob("*.safetensors"))
        assert files, f"no checkpoint of step {self.steps}\n{self.words()}"
        return {
            f"{file.name}/{name}": tensor.numpy().tobytes()
            for file in files
            for name, tensor in load_file(file).items()
        }

    def status(self) -> dict[str, object]:
        return read_status(self.folder)
