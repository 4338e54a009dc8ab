"""Options read from source text are the options that the classes have."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from configs import knobs, load
from trainer.plugins import plugin

PLUGINS = [(kind, name) for kind in knobs.FOLDERS for name in knobs.plugins(kind)]


def test_the_plugins_are_found_by_their_files() -> None:
    assert (
        ("objective", "twinflow") in PLUGINS and ("engine", "fsdp2") in PLUGINS and ("model", "qwen_image") in PLUGINS
    )
    assert ("objective", "losses") not in PLUGINS


@pytest.mark.parametrize("kind, name", PLUGINS)
def test_text_and_class_agree_on_names_and_defaults(kind: str, name: str) -> None:
    read = {knob.name: knob.default for knob in knobs.plugin_knobs(kind, name)}
    _, options = plugin(kind, {"name": name, **read})
    assert read.keys() == {field.name for field in dataclasses.fields(options)}
    for field in dataclasses.fields(options):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
        assert load.json_value(read[field.name]) == load.json_value(default), field.name


@pytest.mark.parametrize("kind, name", PLUGINS)
def test_every_option_is_documented(kind: str, name: str) -> None:
    assert [knob.name for knob in knobs.plugin_knobs(kind, name) if not knob.doc] == []


def test_every_knob_of_the_schema_is_documented() -> None:
    missing = [f"{section}.{k.name}" for section, some in load.schema_sections().items() for k in some if not k.doc]
    assert missing == []


def test_units_are_read_from_the_documentation() -> None:
    units = {knob.name: knob.unit for knob in load.schema_sections()["data"]}
    assert units["cache_gb"] == "GB" and units["lanes"] == ""


def test_an_unknown_plugin_lists_those_that_exist() -> None:
    with pytest.raises(knobs.UnknownPlugin, match="flow_matching, rcgm, twinflow"):
        knobs.plugin_knobs("objective", "gan")
    with pytest.raises(knobs.UnknownPlugin):
        knobs.plugin_knobs("objective", "../objectives/twinflow")


def test_neither_configuration_nor_launcher_import_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'diffusers', 'mlflow'): sys.modules[name] = None\n"  # any import of them fails
        "from typer.testing import CliRunner\n"
        "from launcher.cli import app\n"
        "for verb in ('check', 'show'):\n"
        "    result = CliRunner().invoke(app, ['config', verb, 'configs/smoke.yaml'])\n"
        "    assert result.exit_code == 0, result.output\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=knobs.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
