"""What a SLURM cluster is like: one YAML file per cluster (configs/cluster/), as strict as a run's configuration.

The string under a field is its documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.load import ConfigError, read_override, read_yaml, refuse_unknown


@dataclass
class Container:
    kind: str = "none"
    """none (the virtual environment that submits) | pyxis (srun --container-image, enroot) | apptainer."""
    image: str = ""
    """Image: a file, or for pyxis also registry#name:tag."""
    mounts: list[str] = field(default_factory=list)
    """Folders of the node inside the container, SOURCE:DESTINATION; the run's folder and the current one always are."""
    python: str = "python3"
    """Interpreter inside the image."""


@dataclass
class Cluster:
    nodes: int = 1
    """Nodes of the job."""
    gpus_per_node: int = 8
    """GPUs of a node, one rank each; 0: runtime.nproc ranks on the CPU."""
    cpus_per_node: int | None = None
    """CPU cores of the node's one task; null: what SLURM gives."""
    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: str = "24:00:00"
    """Time limit of one job of the chain: MINUTES, HH:MM:SS or DAYS-HH:MM:SS."""
    exclusive: bool = True
    """Take whole nodes."""
    directives: list[str] = field(default_factory=list)
    """Further sbatch options, for instance --constraint=h200 or --mail-type=FAIL."""
    srun: list[str] = field(default_factory=list)
    """Further srun options, for instance --mpi=none."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment of the ranks: NCCL, EFA and InfiniBand settings. No secrets: the script is readable."""
    scratch: str = "/tmp"
    """Node-local folder of compile caches (Triton, Inductor, CUDA)."""
    container: Container = field(default_factory=Container)
    """What the ranks run in."""
    interface: str | None = None
    """Network interface of the first node that the ranks meet at; null: the address by which SLURM reaches the node."""
    port: int | None = None
    """TCP port of the rendezvous on the first node; null: a free one."""
    grace_s: int = 600
    """Time before the limit at which SLURM warns the job, for the last step and the save [s]."""
    max_requeues: int = 200
    """Requeues of one submission; the chain stops at the next end of a job."""
    max_failures: int = 3
    """Jobs in a row that end without a new checkpoint before the chain stops."""
    startup_s: float = 3600.0
    """Longest time from the start of the ranks to their first step [s]."""
    silence_s: float = 1800.0
    """Longest time without any progress of a rank after that; then the job is ended and requeued [s]."""
    stop_s: float = 1200.0
    """Longest time for the last step and the save after a request to stop [s]."""
    exclude: list[str] = field(default_factory=list)
    """Nodes that are never used."""
    max_excluded: int = 4
    """Nodes that failed and may be excluded from later jobs of the chain."""
    notify_command: list[str] = field(default_factory=list)
    """Program and arguments that tell a person when a chain stops; the message comes on its standard input."""
    notify_url: str | None = None
    """Webhook that gets the same as JSON by POST. ${oc.env:NAME} takes it from the environment."""


_RANGES: dict[str, tuple[float, float]] = {
    "nodes": (1, 100_000),
    "gpus_per_node": (0, 1024),
    "cpus_per_node": (1, 100_000),
    "port": (1, 65535),
    "grace_s": (1, 65535),
    "max_requeues": (0, 1_000_000),
    "max_failures": (1, 1000),
    "startup_s": (1, 1e9),
    "silence_s": (1, 1e9),
    "stop_s": (1, 1e9),
    "max_excluded": (0, 1_000_000),
}


def load_cluster(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Cluster:
    """The cluster that files (from left to right) and key=value describe.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, a value out of range, or an unreadable file.
    """
    merged = OmegaConf.structured(Cluster)
    layers = [(str(file), read_yaml(Path(file))) for file in files] + [
        (text, read_override(text)) for text in overrides
    ]
    for where, layer in layers:
        refuse_unknown(layer, merged, where)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {error.full_key or error.key}: {str(error).splitlines()[0]}") from error
    try:
        cluster = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or error.key}: {str(error).splitlines()[0]}") from error
    assert isinstance(cluster, Cluster)
    if problems := list(_problems(cluster)):
        raise ConfigError("\n".join(problems))
    return cluster


def time_limit_s(text: str) -> int:
    """SLURM's MINUTES, MINUTES:SECONDS, HH:MM:SS, DAYS-HH[:MM[:SS]] in seconds; ValueError otherwise."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"time is {text!r}; write HH:MM:SS or DAYS-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None or len(numbers) == 3:
        hours, minutes, seconds = ([*numbers, 0, 0])[:3]
    else:
        hours, minutes, seconds = 0, numbers[0], ([*numbers, 0])[1]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _problems(cluster: Cluster) -> Iterator[str]:
    for name, (low, high) in _RANGES.items():
        value = getattr(cluster, name)
        if value is not None and not low <= value <= high:
            yield f"{name} is {value}; legal is {low:g} .. {high:g}"
    if cluster.container.kind not in ("none", "pyxis", "apptainer"):
        yield f"container.kind is {cluster.container.kind!r}; choose none, pyxis or apptainer"
    elif (cluster.container.kind == "none") != (not cluster.container.image):
        yield "container.image belongs to container.kind pyxis or apptainer, and to these only; set both or neither"
    try:
        limit = time_limit_s(cluster.time)
    except ValueError as error:
        yield str(error)
    else:
        if limit and limit <= cluster.grace_s:
            yield f"grace_s is {cluster.grace_s}, the time limit {cluster.time}: a job would stop before it starts"
    for option in (*cluster.directives, *cluster.srun):
        if not re.fullmatch(r"-[^\s\x00-\x1f][^\n\r\x00]*", option):
            yield f"{option!r} is no option; write each as one text, for instance --constraint=h200"
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"environment: {name!r} is no name of a variable"
