"""A cluster file is as strict as a run's configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from configs import knobs
from configs.clusters import Cluster, load_cluster, time_limit_s
from configs.load import ConfigError

FOLDER = Path(__file__).parents[2] / "configs" / "cluster"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_come_along_are_legal(file: Path) -> None:
    assert load_cluster([file]).nodes >= 1


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("partition: big\nenvironment: {A: '1'}\n")
    cluster = load_cluster([FOLDER / "h200_ib.yaml", mine], ["nodes=3", "container.image=b.sqsh"])
    assert (cluster.partition, cluster.nodes, cluster.container.image) == ("big", 3, "b.sqsh")
    assert cluster.environment["A"] == "1" and cluster.environment["NCCL_IB_HCA"] == "mlx5"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("ndoes=2", "did you mean nodes"),
        ("container.imgae=x", r"did you mean container\.image"),
        ("nodes=two", "nodes"),
        ("nodes=0", "nodes is 0; legal is 1"),
        ("grace_s=0", "grace_s is 0"),
        ("time=tomorrow", r"write HH:MM:SS or DAYS-HH:MM:SS"),
        ("time='00:05:00'", "grace_s is 600, the time limit 00:05:00"),
        ("container.kind=docker", "choose none, pyxis or apptainer"),
        ("container.kind=pyxis", "set both or neither"),
        ("container.image=x.sif", "set both or neither"),
        ("directives=[gres=gpu]", "is no option"),
        ('srun=["--a\\nb"]', "is no option"),
        ("environment={A-B: '1'}", "is no name of a variable"),
    ],
)
def test_a_mistake_is_refused_with_the_remedy(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_cluster([], [override])


def test_every_knob_is_documented() -> None:
    known = knobs.schema_knobs(Path(knobs.ROOT) / "configs" / "clusters.py")["Cluster"]
    assert [knob.name for knob in known] == [field.name for field in dataclasses.fields(Cluster)]
    assert all(knob.doc.endswith((".", "].")) or knob.doc for knob in known)


def test_time_limits_are_those_of_slurm() -> None:
    written = ["30", "30:10", "24:00:00", "2-00", "1-02:03:04"]
    assert [time_limit_s(text) for text in written] == [1800, 1810, 86400, 172800, 93784]
