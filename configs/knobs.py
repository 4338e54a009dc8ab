"""Options and documentation of every knob, read from source text: checking a configuration imports no plug-in and no torch.

The plug-in `objective.name: flow_matching` is trainer/objectives/flow_matching.py. Its options are the fields of the
dataclass there whose lower-cased name is the module's name without underscores (FlowMatching), or that name followed
by "options" (FSDP2Options). A field is `name: annotation = literal`, the string under it its documentation.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"objective": "trainer/objectives", "model": "models/backbones", "engine": "trainer/engines"}


class UnknownPlugin(ValueError):
    """No such plug-in; the message lists those that exist."""


@dataclass(frozen=True)
class Knob:
    """One option. doc: what it means, with its unit in brackets at the end where it has one."""

    name: str
    annotation: str
    default: Any
    has_default: bool
    doc: str

    @property
    def unit(self) -> str:
        match = re.search(r"\[([^\[\]]+)\]", self.doc)
        return match[1] if match else ""


def plugins(kind: str) -> list[str]:
    """Names of the plug-ins of a kind: the modules that define a class of options."""
    return sorted(path.stem for path in (ROOT / FOLDERS[kind]).glob("*.py") if _options_class(path) is not None)


def plugin_knobs(kind: str, name: str) -> list[Knob]:
    """Options of a plug-in, bases first.

    Raises:
        UnknownPlugin: there is no such file, or it defines no options.
    """
    path = ROOT / FOLDERS[kind] / f"{name}.py"
    node = _options_class(path) if name.isidentifier() and path.exists() else None
    if node is None:
        raise UnknownPlugin(f"{kind}.name is {name!r}; choose one of {', '.join(plugins(kind))}")
    return list(_with_bases(path, node).values())


def schema_knobs(path: Path) -> dict[str, list[Knob]]:
    """Knobs of every dataclass in a file, by class name."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return {node.name: list(_own(node)) for node in classes}


def options_dataclass(kind: str, knobs: list[Knob]) -> type:
    """A dataclass with the plug-in's fields and `name`, which OmegaConf validates like any other."""
    fields: list[Any] = [("name", str)]
    for knob in knobs:
        default = knob.default
        if not knob.has_default:
            fields.append((knob.name, _type(knob.annotation)))
        elif isinstance(default, dict | list):
            fields.append(
                (
                    knob.name,
                    _type(knob.annotation),
                    dataclasses.field(default_factory=functools.partial(copy.deepcopy, default)),
                )
            )
        else:
            fields.append((knob.name, _type(knob.annotation), default))
    return dataclasses.make_dataclass(f"{kind.capitalize()}Options", fields)


def _options_class(path: Path) -> ast.ClassDef | None:
    wanted = path.stem.replace("_", "").lower()
    classes = {
        node.name.lower(): node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    }
    return classes.get(wanted) or classes.get(f"{wanted}options")


def _with_bases(path: Path, node: ast.ClassDef) -> dict[str, Knob]:
    """Options of a class of the file and of its bases, from this file or imported from others of ours."""
    module, knobs = ast.parse(path.read_text()), dict[str, Knob]()
    imports = {
        alias.asname or alias.name: (ROOT / f"{(statement.module or '').replace('.', '/')}.py", alias.name)
        for statement in module.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    for base in map(ast.unparse, node.bases):
        base_path, name = imports.get(base, (path, base))
        classes = ast.parse(base_path.read_text()).body if base_path.exists() else []
        found = next((n for n in classes if isinstance(n, ast.ClassDef) and n.name == name), None)
        if found is not None:
            knobs |= _with_bases(base_path, found)
    return knobs | {knob.name: knob for knob in _own(node)}


def _own(node: ast.ClassDef) -> Iterator[Knob]:
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        has_default, default = _default(statement.value)
        doc = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            doc = " ".join(str(following.value.value).split())
        yield Knob(statement.target.id, ast.unparse(statement.annotation), default, has_default, doc)


def _default(value: ast.expr | None) -> tuple[bool, Any]:
    if value is None or (isinstance(value, ast.Name) and value.id == "MISSING"):
        return False, None
    if isinstance(value, ast.Call):
        if ast.unparse(value.func) == "float":
            return True, float(ast.literal_eval(value.args[0]))
        factory = next(k.value for k in value.keywords if k.arg == "default_factory")
        if isinstance(factory, ast.Lambda):
            return True, ast.literal_eval(factory.body)
        return True, {"list": [], "dict": {}}.get(ast.unparse(factory))
    return True, ast.literal_eval(value)


def _type(annotation: str) -> Any:
    names = {
        "bool": bool,
        "int": int,
        "float": float,
        "str": str,
        "list": list,
        "dict": dict,
        "tuple": tuple,
        "None": None,
    }
    if set(re.findall(r"[A-Za-z_]+", annotation)) - set(names):
        raise TypeError(f"an option is annotated {annotation!r}; options use only {', '.join(names)}")
    return eval(annotation, {"__builtins__": {}}, names)  # checked above: these names and punctuation only
