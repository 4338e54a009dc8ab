"""(kind, name, options) -> object: the name in the YAML is the module's name, no registry to edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

PACKAGES = {"objective": "trainer.objectives", "engine": "trainer.engines", "model": "models.backbones"}


def plugin(kind: str, section: Mapping[str, Any]) -> tuple[Any, Any]:
    """The plug-in's class and its options object.

    section: {"name": ..., option: value, ...}, already validated by configs/load.py. For an objective the class itself
    is the dataclass of the options and is returned with its instance.
    """
    values = dict(section)
    name = values.pop("name")
    module = import_module(f"{PACKAGES[kind]}.{name}")
    cls = _member(module, name.replace("_", ""))
    schema: Any = cls if dataclasses.is_dataclass(cls) else _member(module, f"{name}options".replace("_", ""))
    fields = {field.name: field.type for field in dataclasses.fields(schema)}
    tuples = {key: tuple(v) if "tuple" in str(fields[key]) and v is not None else v for key, v in values.items()}
    return cls, schema(**tuples)


def _member(module: ModuleType, lowered: str) -> Any:
    found = [value for key, value in vars(module).items() if key.lower() == lowered and isinstance(value, type)]
    if len(found) != 1:
        raise ImportError(f"{module.__name__} must define one class whose lower-cased name is {lowered!r}")
    return found[0]
