"""The Qwen-Image backbone, beyond what holds for every backbone."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline

from configs.schema import Lora
from models import attention, lora, tiny
from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage, pack, unpack
from tests.models.conftest import Rows
from tests.models.varlen import reference


def test_packing_is_the_pipelines() -> None:
    latents = torch.randn(2, 4, 6, 8)
    tokens = pack(latents, 2)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(tokens, 2, 6, 8), latents)
    other = torch.randn(2, 3, 6, 12)
    assert torch.equal(unpack(pack(other, 3), 3, 6, 12), other)


def test_misuse_is_named(backbone: QwenImage, rows: Rows) -> None:
    x_t, t, _, cond = rows
    for wrong in (x_t[:2], x_t[:, :3], x_t[:, :, :5]):
        with pytest.raises(ValueError, match="reference latents of shape"):
            backbone(x_t, t, None, dataclasses.replace(cond, references=(wrong,)))
    with pytest.raises(ValueError, match="guidance_embeds"):
        QwenImage({"guidance_embeds": True}, device="meta")


@pytest.fixture(params=["edit", "edit_plus"])
def editing(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny.write(tmp_path / "model", request.param, seed=0)
    return tmp_path / "model"


@pytest.fixture
def editor(editing: Path) -> QwenImage:
    model = QwenImage.from_folder(editing, device="cpu")
    model.load(str(editing))
    return model


def with_references(cond: Conditioning, *sizes: tuple[int, int]) -> Conditioning:
    generator = torch.Generator().manual_seed(5)
    references = tuple(torch.randn(len(cond), 4, *size, generator=generator) for size in sizes)
    return dataclasses.replace(cond, references=references)


@torch.no_grad()
def test_a_row_sees_its_own_references_in_their_order(editor: QwenImage, rows: Rows) -> None:
    x_t, t, r, cond = rows
    none, one, two = (with_references(cond, *sizes) for sizes in ((), ((4, 6),), ((4, 6), (4, 6))))
    found = [editor(x_t, t, r, each) for each in (none, one, two)]
    turned = dataclasses.replace(two, references=two.references[::-1])
    for a, b in itertools.combinations([*found, editor(x_t, t, r, turned)], 2):
        assert (a - b).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    others = two.references[0].clone()
    others[1:] += 1
    changed = editor(x_t, t, r, dataclasses.replace(two, references=(others, two.references[1])))
    assert torch.equal(changed[0], found[2][0])
    assert (changed[1:] - found[2][1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(editor(x_t[1:2], t[1:2], r[1:2], two[1:2]), found[2][1:2], rtol=0, atol=2e-6)


@torch.no_grad()
def test_references_of_2511_stand_at_time_zero(editor: QwenImage, rows: Rows) -> None:
    """Embeddings of times: the rows' own, with their target times, and after them E1(0), whatever t and r are."""
    x_t, t, r, cond = rows
    seen = list[torch.Tensor]()
    editor.time_text_embed.register_forward_hook(lambda _m, _a, out: seen.append(out))
    for times in ((t, r), (t / 2, -r)):
        editor(x_t, *times, with_references(cond, (4, 6)))
    if not editor.config.zero_cond_t:
        assert [len(out) for out in seen] == [3, 3]
        return
    assert [len(out) for out in seen] == [6, 6]
    assert torch.equal(seen[0][3:], seen[1][3:]) and not torch.isclose(seen[0][:3], seen[1][:3]).all(dim=1).any()
    editor(x_t, 0 * t, 0 * r, with_references(cond, (4, 6)))
    torch.testing.assert_close(seen[2][:3], seen[0][3:], rtol=0, atol=2e-6)


def test_flash_attention_packs_references(editor: QwenImage, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    x_t, t, r, cond = rows
    model = editor.double()
    given = x_t.double(), t.double(), r.double(), with_references(cond, (4, 6)).to("cpu", torch.float64)
    native = model(*given)
    monkeypatch.setattr(attention, "load_kernel", lambda name: reference)
    attention.use(model, "flash")
    model._packs = True
    torch.testing.assert_close(model(*given), native, rtol=0, atol=1e-11)


@torch.no_grad()
def test_adapters_tell_the_times_of_references_whose_they_are(editing: Path, editor: QwenImage, rows: Rows) -> None:
    """One pass of online, averaged and base rows is what passes of one kind give: also where a row has two times."""
    x_t, t, r, cond = rows
    cond = with_references(cond, (4, 6))
    for teacher in ("ema", "frozen"):
        model = QwenImage.from_folder(editing)
        lora.add(model, Lora(rank=2), teacher)
        model.to_empty(device="cpu").load(str(editing))
        lora.initialise(model, seed=1, scatter=True)
        marks = torch.tensor([0, 1, 0])
        mixed = model(x_t, t, r, cond, weights=marks)
        alone = [model(x_t, t, r, cond, weights=torch.full((3,), kind)) for kind in (0, 1)]
        expected = torch.where(marks.bool()[:, None, None, None], alone[1], alone[0])
        torch.testing.assert_close(mixed, expected, rtol=0, atol=2e-6)
        if teacher == "frozen":
            torch.testing.assert_close(alone[1], editor(x_t, t, r, cond), rtol=0, atol=2e-6)
            assert (alone[0] - alone[1]).abs().max() > 1e-3
