from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch import distributed as dist

from tests.ranks import run_ranks
from trainer.generate.sample import gather, sample, share, write_grid
from trainer.generate.sampler import preset


@dataclass
class Nets:
    """x_t pulled to the row's condition; remembers the rows of every call."""

    shares_module: bool = True
    calls: list[int] = field(default_factory=list)

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        assert not torch.is_grad_enabled() and t.dtype == r.dtype == x_t.dtype
        self.calls.append(len(x_t))
        return torch.tanh(x_t - cond.reshape(-1, 1, 1, 1)) * (1 + t - r).reshape(-1, 1, 1, 1)


SHAPE = (1, 4, 4)


@pytest.mark.parametrize("name", ["1nfe", "4nfe", "any4"])
def test_a_sample_does_not_depend_on_chunk_order_or_company(name: str) -> None:
    ids, cond = torch.arange(7), torch.linspace(-1, 1, 7, dtype=torch.float64)
    whole = sample(Nets(), cond, SHAPE, preset(name), 5, ids, "cpu", dtype=torch.float64)
    chunked = sample(Nets(), cond, SHAPE, preset(name), 5, ids, "cpu", chunk=3, dtype=torch.float64)
    alone = sample(Nets(), cond[4:5], SHAPE, preset(name), 5, ids[4:5], "cpu", dtype=torch.float64)
    flipped = sample(Nets(), cond.flip(0), SHAPE, preset(name), 5, ids.flip(0), "cpu", dtype=torch.float64)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(alone, whole[4:5], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(flipped.flip(0), whole, rtol=1e-13, atol=1e-13)
    other_seed = sample(Nets(), cond, SHAPE, preset(name), 6, ids, "cpu", dtype=torch.float64)
    assert (other_seed - whole).abs().min() > 0


def test_rows_of_equal_condition_differ_and_the_start_is_shared_by_samplers() -> None:
    seen: list[Tensor] = []

    class First(Nets):
        def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
            if float(t[0]) == 1.0:
                seen.append(x_t)
            return super().velocity(x_t, t, r, cond, weights)

    ids, cond = torch.arange(4), torch.zeros(4)
    latents = [sample(First(), cond, SHAPE, preset(name), 0, ids, "cpu") for name in ("1nfe", "any4")]
    assert torch.equal(seen[0], seen[1]) and latents[0].dtype == torch.float32
    assert torch.pdist(latents[0].flatten(1)).min() > 0.1


def test_fresh_noise_differs_between_steps() -> None:
    # With F = x_t the sample of a re-noising sampler is (1 - t) times its last input: the noise of the last step shows.
    class Identity(Nets):
        def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
            inputs.append(x_t)
            return torch.zeros_like(x_t)

    inputs: list[Tensor] = []
    sample(Identity(), torch.zeros(1), SHAPE, preset("4nfe"), 0, torch.arange(1), "cpu", dtype=torch.float64)
    fresh = [(inputs[i + 1] - (1 - s) * inputs[i]) / s for i, s in enumerate([5 / 6, 2 / 3, 0.5])]
    assert all((a - b).abs().min() > 1e-3 for a, b in zip(fresh, [inputs[0], *fresh], strict=False))


@pytest.mark.parametrize(("total", "world_size"), [(1, 1), (7, 2), (8, 2), (3, 5), (2000, 16)])
def test_ranks_hold_equally_many_rows_and_cover_every_id_in_order(total: int, world_size: int) -> None:
    shares = [share(total, rank, world_size) for rank in range(world_size)]
    assert len({len(ids) for ids in shares}) == 1
    assert torch.cat(shares)[:total].tolist() == list(range(total))
    assert int(torch.cat(shares).max()) == total - 1


def test_all_ranks_make_the_same_calls() -> None:
    calls = []
    for rank in range(3):
        nets, ids = Nets(), share(10, rank, 3)
        sample(nets, torch.zeros(len(ids)), SHAPE, preset("2nfe"), 0, ids, "cpu", chunk=3)
        calls.append(nets.calls)
    assert calls[0] == calls[1] == calls[2] == [3, 3, 1, 1]


def _gathered(total: int) -> list[int] | None:
    rows = gather(share(total, dist.get_rank(), dist.get_world_size())[:, None] * 10, total)
    return None if rows is None else rows.flatten().tolist()


@pytest.mark.parametrize("total", [1, 4, 7])
def test_rank_zero_gathers_every_id_in_order(total: int) -> None:
    assert run_ranks(_gathered, 2, total) == [[10 * i for i in range(total)], None]
    assert _alone(total) == [10 * i for i in range(total)]


def _alone(total: int) -> list[int]:
    rows = gather(share(total, 0, 1)[:, None] * 10, total)
    assert rows is not None
    return rows.flatten().tolist()


def test_conditions_must_match_the_ids() -> None:
    with pytest.raises(ValueError, match=r"3 samples.*2 conditions"):
        sample(Nets(), torch.zeros(2), SHAPE, preset("1nfe"), 0, torch.arange(3), "cpu")


def test_small_images_are_enlarged_with_hard_pixels(tmp_path: Path) -> None:
    images = torch.zeros(6, 1, 8, 8)
    images[4, 0, 2, 3] = 1.0
    images[5, 0, 0, 0] = float("nan")
    path = write_grid(
        tmp_path / "grids" / "sheet.png", images, ["a handwritten one", "a handwritten two"], "1nfe, step 10"
    )
    with Image.open(path) as sheet:
        pixels = torch.tensor(list(sheet.convert("RGB").getdata())).reshape(sheet.height, sheet.width, 3)  # type: ignore[arg-type]
        assert sheet.text["Captions"] == "a handwritten one\na handwritten two"  # type: ignore[attr-defined]
        assert sheet.text["Title"] == "1nfe, step 10"  # type: ignore[attr-defined]
    magenta = (pixels == torch.tensor([255, 0, 255])).all(dim=-1)
    assert int(magenta.sum()) == 8 * 8  # one broken pixel, enlarged eight times
    grey = (pixels == 128).all(dim=-1)
    assert (
        int(grey.sum()) >= 6 * 64 * 64 - 2 * 64 > int(grey.sum()) - 500
    )  # the rest, and at most some of the lettering
    top, left = (int(v) for v in torch.nonzero(magenta)[0])
    square = pixels[top + 16 : top + 24, left - 68 + 24 : left - 68 + 32]  # pixel (2, 3) of the picture to the left
    assert bool((square == 255).all())
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_large_images_are_reduced_and_colours_kept(tmp_path: Path) -> None:
    images = torch.stack([torch.full((3, 300, 600), -1.0), torch.full((3, 300, 600), 1.0)])
    images[0, 0] = 1.0  # red
    path = write_grid(tmp_path / "sheet.png", images, ["a very long caption " * 40])
    with Image.open(path) as sheet:
        assert sheet.width == 2 * 256 + 3 * 4
        assert sheet.getpixel((100, 80)) == (255, 0, 0)


def test_a_layout_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 captioned rows"):
        write_grid(tmp_path / "sheet.png", torch.zeros(4, 1, 8, 8), ["a", "b", "c"])
    with pytest.raises(ValueError, match="captioned rows"):
        write_grid(tmp_path / "sheet.png", torch.zeros(4, 4, 8, 8), ["a"])
