"""A later layer that names another engine."""

from pathlib import Path
from typing import Any

import pytest

from configs.load import ConfigError, load

RUN = ["run.name=x", "data.manifest=d", "train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=1"]


def engine(tmp_path: Path, *sections: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    files = []
    for index, section in enumerate(sections):
        files.append(tmp_path / f"{index}.yaml")
        files[-1].write_text(f"engine: {section}\n")
    return load(files, [*RUN, *more]).engine


def test_what_both_engines_have_stays_and_what_the_replaced_one_alone_has_is_dropped(tmp_path: Path) -> None:
    recipe = "{name: fsdp2, activation_checkpointing: false, keep_gathered: true, block_dtype: bfloat16}"
    found = engine(tmp_path, recipe, more=("engine.name=zero3", "engine.stage=2"))
    assert (found["name"], found["stage"]) == ("zero3", 2)
    assert (found["activation_checkpointing"], found["block_dtype"]) == (False, "bfloat16")
    assert "keep_gathered" not in found


def test_a_section_without_a_name_speaks_to_the_engine_in_force(tmp_path: Path) -> None:
    assert "keep_gathered" not in engine(tmp_path, "{keep_gathered: true}", "{name: zero3}")
    with pytest.raises(ConfigError, match=r"1\.yaml: engine\.replicate is an option of engine fsdp2"):
        engine(tmp_path, "{name: zero3}", "{replicate: 2}")


def test_the_engine_that_is_named_again_keeps_its_options(tmp_path: Path) -> None:
    found = engine(tmp_path, "{name: fsdp2, keep_gathered: true}", "{name: zero3, stage: 2}", "{name: fsdp2}")
    assert found["name"] == "fsdp2" and found["keep_gathered"] is True and "stage" not in found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("engine.name=zero3", "engine.keep_gathered=true"),
            "engine.keep_gathered is an option of engine fsdp2, and engine zero3 has none of that name; remove it, or "
            "set engine.name=fsdp2",
        ),
        (("engine.stage=3",), "engine.stage is an option of engine zero3, and engine fsdp2 has none"),
        (("engine.name=zero3", "engine.keep_gatherd=true"), "unknown key engine.keep_gatherd"),
        (("engine.name=zero4",), "engine.name is 'zero4'; choose one of fsdp2, zero3"),
    ],
)
def test_an_option_of_another_engine_is_refused_by_name(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([], [*RUN, *given])
    assert message in str(caught.value)


def test_the_overlays_choose_their_engine() -> None:
    for name in ("fsdp2", "zero3"):
        assert load(["configs/smoke.yaml", f"configs/engine/{name}.yaml"], []).engine["name"] == name
