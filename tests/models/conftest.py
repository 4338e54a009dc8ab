"""The tiny pipeline folder, built once, and rows to push through its transformer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models import tiny
from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage

Rows = tuple[Tensor, Tensor, Tensor, Conditioning]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    assert tiny.write(path, "pipeline", seed=0)
    return path


@pytest.fixture
def backbone(folder: Path) -> QwenImage:
    model = QwenImage.from_folder(folder, device="cpu")
    model.load(str(folder))
    return model


@pytest.fixture
def rows() -> Rows:
    """x_t, t, r and conditions of 3 rows with 5, 3 and 1 real text tokens."""
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(3, 4, 6, 8, generator=generator)
    t = torch.tensor([0.9, 0.5, -0.3])
    embeds = torch.randn(3, 5, 16, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    return x_t, t, t * 0.25, Conditioning(embeds, mask)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
