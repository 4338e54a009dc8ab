"""Adapters on both engines: what is trained, saved and averaged; a resumed run loses no bit; no option changes a step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Ema, Lora, Optimizer
from models import lora, tiny
from models.backbones.qwen_image import QwenImage
from tests.ranks import run_ranks
from tests.trainer.engines.sameness import assert_same
from tests.trainer.saving.parts import alone
from trainer.engines.engine import whole
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.engines.zero3 import Zero3, Zero3Options
from trainer.objectives.objective import ONLINE, TEACHER
from trainer.saving import unsaved_weights
from trainer.saving.certificate import CheckpointError
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoint_store import LocalCheckpoints

RANK, ROWS, RATE = 2, 12, 0.01
GROUPS = ("parameter", "exp_avg", "exp_avg_sq", "ema")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.write(path, tiny.SMALLEST["qwen_image"], seed=0)
    return str(path)


def make_engine(
    folder: str, teacher: str = "ema", dtype: str = "float64", zero3: bool = False, targets: Any = (), **options: Any
) -> Any:
    backbone = QwenImage.from_folder(folder, dtype=getattr(torch, dtype))
    lora.add(backbone, Lora(rank=RANK, alpha=3, targets=list(targets)), teacher)

    def load(module: Any) -> None:
        module.load(folder)
        lora.initialise(module, seed=1, scatter=True)

    optimizer = Optimizer(learning_rate=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    if zero3:
        engine: Any = Zero3(Zero3Options(**options), backbone, optimizer, Ema(decay=0.9), teacher, load=load)
    else:
        engine = FSDP2(FSDP2Options(**options), backbone, optimizer, Ema(decay=0.9), teacher, load=load)
    engine.folder, engine.dtype = folder, getattr(torch, dtype)  # for `batch`
    return engine


def ranks(function: Any, count: int, *arguments: Any) -> list[Any]:
    """run_ranks with patience for DeepSpeed's import."""
    return run_ranks(function, count, *arguments, timeout=200.0)


@functools.cache
def batch(folder: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """The global batch: latents, times and conditions."""
    x_t, cond, _ = tiny.example(QwenImage.from_folder(folder), ROWS)
    return x_t.to(dtype), torch.linspace(1.0, 0.1, ROWS, dtype=dtype), cond.to("cpu", dtype)


def velocity(engine: Any, rows: slice, kind: int | None = None) -> Tensor:
    """Of some rows of the batch; kind None: online and teacher rows in turn."""
    x_t, t, cond = (part[rows] for part in batch(engine.folder, engine.dtype))
    kinds = (torch.arange(ROWS) % 2 if kind is None else torch.full((ROWS,), kind))[rows]
    return engine.nets.velocity(x_t, t, 0.5 * t, cond, kinds)


def train(engine: Any, steps: range) -> None:
    """Regress on what the teacher's rows of mixed passes say, so that averages steer what is learnt."""
    size = ROWS // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    for step in steps:
        with torch.no_grad():
            velocity(engine, mine)
            target = velocity(engine, mine, TEACHER).cos() + 0.1 * step
        for half in (slice(mine.start, mine.start + size // 2), slice(mine.start + size // 2, mine.stop)):
            error = velocity(engine, half, ONLINE) - target[half.start - mine.start : half.stop - mine.start]
            engine.backward(error.square().mean(dim=(1, 2, 3)).sum() / ROWS)
        engine.step(RATE)
        engine.update_ema()


def state(engine: Any) -> dict[str, dict[str, Tensor]]:
    return {group: whole(engine, group) for group in GROUPS}


# ---- resume


def train_and_save(folder: str, checkpoints: str) -> Any:
    engine, saved = make_engine(folder), alone(Path(checkpoints))
    found = unsaved_weights.fingerprints(engine, "ema")
    train(engine, range(2))
    saved.save(engine, 2, seconds=0.0)
    train(engine, range(2, 4))
    saved.finish()
    return state(engine), engine.counters(), found


def resume(folder: str, checkpoints: str) -> Any:
    engine, saved = make_engine(folder), alone(Path(checkpoints))
    found = unsaved_weights.fingerprints(engine, "ema")
    assert saved.resume(engine).step == 2
    train(engine, range(2, 4))
    return state(engine), engine.counters(), found


def test_a_resumed_run_of_adapters_ends_where_a_quiet_one_does(folder: str, tmp_path: Path) -> None:
    """Bit for bit at the same number of ranks; by law 9 at others. A checkpoint holds the adapters alone."""
    quiet, counters, base = ranks(train_and_save, 2, folder, str(tmp_path))[0]
    for count in (2, 1, 3):
        found, again, same_base = ranks(resume, count, folder, str(tmp_path))[0]
        assert again == counters
        unsaved_weights.check(same_base, base, folder)
        for group in GROUPS:
            if count == 2:
                assert all(torch.equal(found[group][name], tensor) for name, tensor in quiet[group].items())
            assert_same(found[group], quiet[group], 1e-12)
    tensors = CheckpointReader(LocalCheckpoints(tmp_path), "step_00000002").certificate.tensors
    assert tensors.keys() == set(GROUPS)
    for named in tensors.values():
        assert len(named) == 50 and all(lora.Adapters.holds(name) for name in named)
    moved = [not torch.equal(quiet["ema"][name], tensor) for name, tensor in quiet["parameter"].items()]
    assert all(moved), "averages are the parameters themselves"


def start_in_float32(folder: str, zero3: bool, checkpoints: str | None, steps: int) -> Any:
    """Resume where there is a checkpoint, train, save."""
    engine = make_engine(folder, dtype="float32", zero3=zero3)
    saved = alone(Path(checkpoints)) if checkpoints else None
    begin = saved.resume(engine).step if saved else 0
    train(engine, range(begin, steps))
    if saved:
        saved.save(engine, steps, seconds=0.0)
        saved.finish()
    return state(engine)


def test_adapters_change_engines_at_a_checkpoint(folder: str, tmp_path: Path) -> None:
    quiet = ranks(start_in_float32, 2, folder, False, None, 3)[0]
    ranks(start_in_float32, 2, folder, False, str(tmp_path), 1)
    ranks(start_in_float32, 2, folder, True, str(tmp_path), 2)
    found = ranks(start_in_float32, 2, folder, False, str(tmp_path), 3)[0]
    for group in GROUPS:
        assert_same(found[group], quiet[group], 1e-4)


def fingerprints(folder: str, base_dtype: str) -> dict[str, list[float]]:
    engine = make_engine(folder, dtype="float32", block_dtype="bfloat16", base_dtype=base_dtype)
    return unsaved_weights.fingerprints(engine, "online")


def test_another_base_is_refused(folder: str, tmp_path: Path) -> None:
    tiny.write(tmp_path / "other", tiny.SMALLEST["qwen_image"], seed=1)
    (own,), (other,) = (ranks(fingerprints, 1, path, "float32") for path in (folder, str(tmp_path / "other")))
    for found in (own, ranks(fingerprints, 2, folder, "bfloat16")[0]):
        unsaved_weights.check(found, own, "model")
    with pytest.raises(CheckpointError, match=r"not those that this run was started with, and its adapters belong"):
        unsaved_weights.check(other, own, "model")


# ---- passes


def outputs(folder: str, teacher: str, stage: int) -> dict[str, Tensor]:
    if stage:
        engine = make_engine(folder, teacher, "float32", zero3=True, stage=stage)
    else:
        engine = make_engine(folder, teacher)
    rows = slice(0, ROWS)
    with torch.no_grad():
        initial = velocity(engine, rows, TEACHER)
    train(engine, range(3))
    with torch.no_grad():
        found = {kind: velocity(engine, rows, value) for kind, value in (("online", ONLINE), ("taught", TEACHER))}
        mixed = velocity(engine, rows)
        with engine.weights("ema"):
            evaluated = velocity(engine, rows, ONLINE)
        afterwards = velocity(engine, rows, ONLINE)
    return found | {"initial": initial, "mixed": mixed, "evaluated": evaluated, "afterwards": afterwards}


@pytest.mark.parametrize(("teacher", "stage"), [("ema", 0), ("frozen", 0), ("online", 0), ("ema", 3), ("frozen", 2)])
def test_rows_compute_with_the_weights_they_name(folder: str, teacher: str, stage: int) -> None:
    """stage: of DeepSpeed's engine; 0 is FSDP2."""

    def same(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, **({"rtol": 1e-5, "atol": 1e-5} if stage else {"rtol": 1e-12, "atol": 1e-12}))

    for found in ranks(outputs, 2, folder, teacher, stage):
        assert (found["online"] - found["evaluated"]).abs().max() > 1e-3
        assert (found["online"] - found["initial"]).abs().max() > 1e-3
        same(
            found["taught"], {"ema": found["evaluated"], "frozen": found["initial"], "online": found["online"]}[teacher]
        )
        same(found["afterwards"], found["online"])
        even = (torch.arange(ROWS) % 2 == 0).view(-1, 1, 1, 1)
        same(found["mixed"], torch.where(even, found["online"], found["taught"]))


# ---- options


def trained(folder: str, options: list[dict[str, Any]], dtype: str) -> list[Any]:
    found = []
    for chosen in options:
        engine = make_engine(folder, dtype=dtype, **chosen)
        train(engine, range(2))
        found.append(state(engine))
    return found


OPTIONS: list[dict[str, Any]] = [
    {"activation_checkpointing": False},
    {"checkpoint_group": 2, "checkpoint_keep": "products", "keep_gathered": True},
    {"cpu_offload": True},
]


def test_no_option_of_the_engine_changes_a_step_of_adapters(folder: str) -> None:
    assert_all_equal(OPTIONS, *ranks(trained, 2, folder, [{}, *OPTIONS], "float64")[0])


@pytest.mark.slow
def test_compiled_blocks_make_the_same_step_of_adapters(folder: str) -> None:
    """Passes with rows of both kinds and graded ones trace apart, which takes seconds a layer: hence two of them."""
    few = {"targets": ["attn.to_q", "txt_mlp.net.2"], "activation_checkpointing": False}
    compiled = {**few, "compile": True, "compile_backend": "aot_eager"}
    assert_all_equal([compiled], *ranks(trained, 1, folder, [few, compiled], "float64")[0])


def assert_all_equal(chosen: list[dict[str, Any]], expected: Any, *found: Any) -> None:
    for options, state_ in zip(chosen, found, strict=True):
        for group in GROUPS:
            try:
                assert_same(state_[group], expected[group], 1e-12)
            except AssertionError as error:
                raise AssertionError(f"{options}: {group}") from error


def bases_in_both_dtypes(folder: str) -> Any:
    found = trained(folder, [{"block_dtype": "bfloat16", "base_dtype": d} for d in ("float32", "bfloat16")], "float32")
    engine = make_engine(folder, dtype="float32", block_dtype="bfloat16", base_dtype="bfloat16")
    return found, {part.name: part.local.dtype for part in engine.unsaved()}


def test_a_base_in_bfloat16_changes_no_bit_where_blocks_compute_so(folder: str) -> None:
    (wide, narrow), dtypes = ranks(bases_in_both_dtypes, 2, folder)[0]
    for group in GROUPS:
        assert all(torch.equal(narrow[group][name], tensor) for name, tensor in wide[group].items())
    in_blocks = {name for name in dtypes if name.startswith("transformer_blocks.")}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == in_blocks and in_blocks != set(dtypes)


def test_what_stage_2_cannot_do_is_refused(folder: str) -> None:
    """Its ranks hold parts of the averages and compute with the whole."""
    with pytest.raises(ValueError, match=r"averaged adapters as the teacher .* set engine\.stage=3"):
        make_engine(folder, "ema", "float32", zero3=True, stage=2)
