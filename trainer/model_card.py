"""README.md of an exported model: what it is, how to call it, how it was trained, what it scored. No paths, no secrets."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from configs import load as configuration
from trainer.generate.sampler import PRESETS
from trainer.origin import Origin

PAPER = "https://arxiv.org/abs/2512.05150"
SHEETS = 4
"""Contact sheets that go along at most."""


@dataclass(frozen=True)
class Card:
    """What is said beside the run's own records; see trainer.export.Wanted."""

    origin: Origin
    weights: str
    dtype: str
    preset: str
    license: str | None
    base_model: str | None


def write_card(folder: Path, card: Card) -> None:
    """Write README.md, and the run's newest contact sheets to samples/."""
    sheets = _take_sheets(card.origin, folder / "samples")
    parts = [_header(card), _introduction(card), _usage(card), _samples(sheets), _metrics(card.origin), _recipe(card)]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def _header(card: Card) -> str:
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=card.license,
        base_model=card.base_model,
        tags=["twinflow", "few-step", "text-to-image", card.origin.config.model["name"].replace("_", "-")],
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(card: Card) -> str:
    origin = card.origin
    base = card.base_model or f"a {origin.config.model['name']} model (its name was not given)"
    license_note = (
        f"The base model's licence is {card.license}."
        if card.license
        else "The base model's licence was not given at export: look it up before you share this model, its terms apply."
    )
    return (
        f"# {origin.name}\n\n"
        f"Generates images in one to four network evaluations, without guidance. Trained from {base} with "
        f"[TwinFlow]({PAPER}), objective `{origin.config.objective['name']}`, {origin.step} steps; "
        f"{'averaged' if card.weights == 'ema' else 'raw'} weights, {card.dtype}.\n\n{license_note}"
    )


def _usage(card: Card) -> str:
    names = ", ".join(f"`{name}`" for name, sampler in PRESETS.items() if sampler.nfe <= 8)
    return f"""## Use

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH", torch_dtype=torch.{card.dtype}, trust_remote_code=True).to("cuda")
image = pipe("a red panda reading a newspaper", generator=torch.Generator().manual_seed(0)).images[0]
```

The call is the diffusers pipeline's with `preset`, by default `{card.preset}`: {names}, or `fewN`, `anyN`, `multiN` with
N steps. `few` jumps to the image at every step and adds fresh noise, `any` and `multi` follow the trajectory. Guidance is
trained in and off; negative prompts do nothing. `trust_remote_code` runs the Python files of this folder, which need
torch and diffusers alone."""


def _samples(sheets: list[str]) -> str:
    if not sheets:
        return ""
    return "## Samples\n\nDrawn while training.\n\n" + "\n\n".join(f"![{name}](samples/{name}.png)" for name in sheets)


def _take_sheets(origin: Origin, folder: Path) -> list[str]:
    """Copy the newest sheet of each preset that is not younger than the checkpoint; their names."""
    newest: dict[str, tuple[int, Path]] = {}
    found = sorted((origin.run / "pictures").glob("*_step*.png")) if origin.run is not None else []
    for file in found:
        match = re.fullmatch(r"(\w+)_step(\d+)\.png", file.name)
        if match and int(match[2]) <= (origin.step or 0) and int(match[2]) >= newest.get(match[1], (0, file))[0]:
            newest[match[1]] = (int(match[2]), file)
    chosen = sorted(newest.items(), key=lambda item: (len(item[0]), item[0]))[:SHEETS]
    if chosen:
        folder.mkdir()
    for preset, (_, file) in chosen:
        shutil.copyfile(file, folder / f"{preset}.png")
    return [preset for preset, _ in chosen]


def _metrics(origin: Origin) -> str:
    values = measured(origin)
    if not values:
        return ""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in values.items())
    return f"## Metrics\n\n| of the run, up to this checkpoint | |\n|---|---|\n{rows}"


def measured(origin: Origin) -> dict[str, float]:
    """Losses and scores of the run's journal, of each the last one up to the checkpoint's step."""
    journal = None if origin.run is None else origin.run / "journal.jsonl"
    if journal is None or not journal.exists():
        return {}
    found: dict[str, float] = {}
    for line in journal.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a line that a killed run left unfinished
            continue
        if entry.get("kind") == "metrics" and entry.get("step", 0) <= (origin.step or 0):
            found |= {key: value for key, value in entry["values"].items() if _worth_telling(key, value)}
    return dict(sorted(found.items()))


def _worth_telling(name: str, value: Any) -> bool:
    is_score = name == "loss" or name == "held_out/loss" or re.match(r"nfe\d+/", name) is not None
    return is_score and isinstance(value, int | float)


def _recipe(card: Card) -> str:
    """The configuration that defines the run; it names no path."""
    flat = configuration.identity(card.origin.config)
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key.endswith(".path"):
            continue
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    text = yaml.safe_dump(nested, sort_keys=False, default_flow_style=None, width=110).strip()
    metadata = card.origin.reader.certificate.metadata if card.origin.reader is not None else {}
    revision = metadata.get("code_revision") or "unknown"
    return f"## Recipe\n\nTrainer revision `{revision}`.\n\n```yaml\n{text}\n```"
