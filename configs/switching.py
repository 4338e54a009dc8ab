"""Another plug-in than an earlier layer named: whose options are whose."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from configs import knobs
from configs.schema import Config


def without_replaced_engine(layers: Sequence[tuple[str, DictConfig]]) -> list[tuple[str, DictConfig]]:
    """The layers without what they say to an engine that a later layer replaces and that has no meaning for the new one.

    `train configs/smoke.yaml engine.name=zero3` drops smoke.yaml's `keep_gathered`. The engine is circumstance: what it
    is told cannot change the experiment. Options that both engines have stay, and an option that stands beside the name
    of an engine without it is left for the refusal.
    """
    names = [section.get("name") for _, layer in layers if isinstance(section := layer.get("engine"), DictConfig)]
    chosen = next((name for name in reversed(names) if name), None)
    if chosen is None or chosen not in knobs.plugins("engine"):
        return list(layers)
    kept, current, legal = [], Config().engine["name"], _options("engine", chosen)
    for where, layer in layers:
        section = layer.get("engine")
        if isinstance(section, DictConfig):
            current = section.get("name") or current
            if current != chosen and current in knobs.plugins("engine"):
                replaced = _options("engine", str(current)) - legal
                layer = layer.copy()
                layer["engine"] = {key: value for key, value in section.items() if key not in replaced}
        kept.append((where, layer))
    return kept


def owners(kind: str, option: str) -> list[str]:
    """Plug-ins of a kind that have an option of this name."""
    return [name for name in knobs.plugins(kind) if option in _options(kind, name)]


def _options(kind: str, name: str) -> set[str]:
    return {knob.name for knob in knobs.plugin_knobs(kind, name)}
