"""One Python file that needs nothing of this project: a module with its imports of ours replaced by their source.

diffusers takes exactly one file for each custom component from a hub repository, so what travels must be one file.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("configs", "data", "models", "trainer", "launcher")
HEADER = "# Written by `twinflow export`. Apache-2.0.\n"
FUTURE = "from __future__ import annotations\n"


def bundle(module: str) -> str:
    """Source of `module` (dotted name) that imports nothing of this project.

    Raises:
        ValueError: an import of ours that cannot be put in place: not at the top level, renamed, or of a whole module.
    """
    included: set[str] = set()
    return HEADER + FUTURE + _inlined(module, included)


def _inlined(module: str, included: set[str]) -> str:
    included.add(module)
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    source = file.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    for node in ast.walk(tree):
        wanted = _imported(node)
        if node in tree.body and isinstance(node, ast.ImportFrom) and all(alias.asname is None for alias in node.names):
            continue
        if any(name.split(".")[0] in OURS for name in wanted):
            raise ValueError(f"{file}:{node.lineno} cannot travel: write `from {wanted[0]} import NAME` at the top")  # type: ignore[attr-defined]
    parts, position = [], 0
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module == "__future__":
            replacement = ""
        elif node.module.split(".")[0] in OURS:
            replacement = "" if node.module in included else _inlined(node.module, included)
        else:
            continue
        parts += [*lines[position : node.lineno - 1], replacement]
        position = node.end_lineno or node.lineno
    return "".join([*parts, *lines[position:]])


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
