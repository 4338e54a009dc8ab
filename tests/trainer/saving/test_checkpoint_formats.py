"""Formats of the certificate: what earlier versions wrote opens, what later ones wrote says which version opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.saving.parts import alone, latest, numbered, parts_of
from trainer.engines.engine import TensorPart
from trainer.saving import certificate, checkpoint_store
from trainer.saving.certificate import CheckpointError, UnknownFormatError
from trainer.saving.checkpoint import Checkpoints
from trainer.saving.checkpoint_store import LocalCheckpoints

FORMAT_1 = Path(__file__).parents[2] / "golden" / "checkpoint_format_1"
"""Written by two ranks of the version before format 2: w [2, 3] cut between them, b [4] on rank 0, in four groups."""


def test_what_the_first_format_wrote_opens(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(FORMAT_1, folder)
    for scale, group in enumerate(("parameter", "exp_avg", "exp_avg_sq", "ema")):
        target = numbered(0)
        found = alone(folder).read("step_00000005", parts_of(target, group))
        assert torch.equal(target["w"], numbered(5)["w"] * 10**scale)
        assert torch.equal(target["b"], numbered(5)["b"] * 10**scale)
    assert found.counters["training_seconds"] == 2.5 and found.metadata["world_size"] == 2
    alone(folder).write(10, parts_of(numbered(10)), {})  # a run goes on in it, in the new format
    assert [name for name, _ in checkpoint_store.complete(LocalCheckpoints(folder))] == [
        "step_00000010",
        "step_00000005",
    ]


@pytest.mark.parametrize("number", [0, certificate.FORMAT + 1])
def test_another_format_names_the_version_that_opens_it(number: int, tmp_path: Path) -> None:
    metadata = {"code_revision": "a1b2c3", "versions": {"torch": "2.13.0"}}
    checkpoints = Checkpoints(tmp_path, alone(tmp_path)._options, metadata)
    newest = tmp_path / checkpoints.write(5, parts_of(numbered(5)), {})
    content = json.loads((newest / certificate.NAME).read_text())
    (newest / certificate.NAME).write_text(json.dumps({**content, "format": number}))
    with pytest.raises(UnknownFormatError, match=rf"format {number}, .* reads 1 to 2.*revision a1b2c3.*2\.13\.0"):
        latest(tmp_path)


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    mixed = {
        "a": torch.arange(3.0, dtype=torch.bfloat16),
        "b": torch.arange(5.0, dtype=torch.float64),
        "c": torch.ones(2),
    }
    path = tmp_path / alone(tmp_path).write(5, parts_of(mixed), {})
    found = load_file(path / "rank_00000.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        f"parameter/{name}": tensor.tolist() for name, tensor in mixed.items()
    }
    target = {name: torch.zeros_like(tensor) for name, tensor in mixed.items()}
    alone(tmp_path).read(path, parts_of(target))
    assert all(torch.equal(target[name], tensor) for name, tensor in mixed.items())


def test_a_part_from_amid_a_tensor_is_read_alone(tmp_path: Path) -> None:
    whole = torch.arange(100.0)
    path = alone(tmp_path).write(5, parts_of({"w": whole}), {})
    local = torch.zeros(7)
    alone(tmp_path).read(path, [TensorPart("parameter", "w", (100,), 31, local)])
    assert torch.equal(local, whole[31:38])


def test_every_nth_checkpoint_stays_for_ever_and_the_last_ones_do(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path, keep_last=2, keep_every=10)
    for step in (5, 10, 15, 20, 25, 30):
        checkpoints.write(step, parts_of(numbered(step)), {})
    kept = [checkpoint_store.step_of(name) for name in LocalCheckpoints(tmp_path).listing()]
    assert sorted(kept) == [10, 20, 25, 30]


def test_what_a_run_resumed_from_stays_until_a_newer_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(tmp_path).write(5, parts_of(numbered(5)), {})
    checkpoints = alone(tmp_path, keep_last=1)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Input/output"):
        patch.setattr("trainer.saving.durable.write_all", fail)
        checkpoints.write(10, parts_of(numbered(10)), {})
    assert latest(tmp_path) == tmp_path / "step_00000005"
    checkpoints.write(15, parts_of(numbered(15)), {})
    assert list(LocalCheckpoints(tmp_path).listing()) == ["step_00000015"]
