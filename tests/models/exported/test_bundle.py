"""What travels with an exported model needs torch and diffusers alone."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

from models.exported import bundle

FILES = Path(bundle.__file__).parent
EXPORTED = sorted(
    {
        f"models.exported.{'.'.join(file.relative_to(FILES).with_suffix('').parts)}"
        for file in FILES.rglob("*.py")
        if "class TwinFlow" in file.read_text()
    }
    | {"trainer.generate.scheduler"}
)


@pytest.mark.parametrize("module", EXPORTED)
def test_an_exported_file_imports_torch_diffusers_and_the_standard_library(module: str) -> None:
    tree = ast.parse(bundle.bundle(module))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    sources = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in sources)
    imported |= {str(node.module).split(".")[0] for node in sources}
    standard = {
        "__future__",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "functools",
        "itertools",
        "math",
        "re",
    }
    assert imported <= standard | {"typing", "torch", "diffusers"}


@pytest.mark.parametrize("file", sorted((FILES / "pipelines").glob("[a-z]*.py")), ids=lambda file: file.stem)
def test_every_exported_pipeline_has_guidance_off(file: Path) -> None:
    module = import_module(f"models.exported.pipelines.{file.stem}")
    pipelines = [value for name, value in vars(module).items() if name.startswith("TwinFlow")]
    assert pipelines
    for pipeline in pipelines:
        base = next(cls for cls in pipeline.__mro__ if cls.__module__.startswith("diffusers."))
        scales = {"true_cfg_scale", "guidance_scale"} & inspect.signature(base.__call__).parameters.keys()
        scale = "true_cfg_scale" if "true_cfg_scale" in scales else "guidance_scale"
        assert pipeline.own_defaults[scale] in (0.0, 1.0)


def test_every_import_of_ours_is_put_in_place_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    write(tmp_path / "models/a.py", "from models.b import (\n    B,\n)\nfrom models.c import C\n\nA = B + C\n")
    write(tmp_path / "models/b.py", '"""B."""\n\nimport math\n\nfrom models.c import C\n\nB = math.floor(C)\n')
    write(tmp_path / "models/c.py", "C = 2.5\n")
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    source, names = bundle.bundle("models.a"), dict[str, object]()
    exec(compile(source, "a", "exec"), names)
    assert names["A"] == 4.5 and source.count("C = 2.5") == 1 and "models." not in source


@pytest.mark.parametrize(
    "line", ["import models.c", "from models.c import C as D", "def f():\n    from models.c import C", "import data"]
)
def test_an_import_that_cannot_travel_is_refused(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    write(tmp_path / "models/a.py", line + "\n")
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"a\.py:\d+ cannot travel"):
        bundle.bundle("models.a")


def write(path: Path, source: str) -> None:
    path.write_text(f"from __future__ import annotations\n\n{source}")
