"""Configuration of a run: schema <- YAML files from left to right <- key=value. Strict, without torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs import knobs, rules, switching
from configs.schema import Config

IDENTITY_SECTIONS = ("model", "lora", "init_from", "objective", "guidance", "optimizer", "schedule", "encoder", "ema")
IDENTITY_KEYS = ("run.seed", "train.steps", "train.global_batch_size", "data.lanes", "data.flip")
# Where the same weights lie, and which kernel computes attention, does not make another experiment.
CIRCUMSTANCE_KEYS = ("model.path", "model.attention", "guidance.allow_divergent")
_SECRET = re.compile(r"secret|token|password|credential|(^|_)key$", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/\s]+(?=@)")  # up to the last @: a password may hold one
_URL_QUERY = re.compile(r"(?<=[?&])([^=&\s]*(?:secret|token|password|credential|signature|key))=[^&\s]+", re.IGNORECASE)
_INTERPOLATION = re.compile(r"(\\*)\$\{")


class ConfigError(ValueError):
    """A mistake in a configuration; the message names the key, where it stands and the remedy."""


def load(files: Sequence[str | Path], overrides: Sequence[str] = (), recorded: dict[str, Any] | None = None) -> Config:
    """The resolved configuration. recorded: values of an earlier one (to_dict), below the files, taken literally: a
    checkpoint may be anyone's, and its ${oc.env:NAME} would read this machine's environment.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type (with the expected one), missing value, a broken
            rule between keys, or an unreadable file.
    """
    layers = [("the recorded configuration", OmegaConf.create(_literal(recorded)))] if recorded else []
    layers += [(str(file), read_yaml(Path(file))) for file in files]
    layers += [(text, read_override(text)) for text in overrides]
    layers = switching.without_replaced_engine(layers)
    schema = _schema(layers)
    merged = OmegaConf.structured(schema)
    entries = {text for text in overrides if text.split("=")[0].count(".") >= 2}  # one entry of a mapping
    for where, layer in layers:
        refuse_unknown(layer, merged, where)
        if where not in entries:
            _empty_mappings(merged, layer)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {_explain(error, layer, merged)}") from error
    assert isinstance(merged, DictConfig)
    config = _to_config(merged)
    rules.apply(config, ConfigError)
    return config


def _literal(value: Any) -> Any:
    """The value with every "${" escaped, as OmegaConf's grammar has it: backslashes before it count double."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return _INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values (tuples as lists), secrets redacted."""
    return _redact(json_value(dataclasses.asdict(config)))


def json_value(value: Any) -> Any:
    """The value as JSON holds it: tuples become lists."""
    return json.loads(json.dumps(value))


def to_yaml(config: Config) -> str:
    """Resolved YAML, secrets redacted."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120)


def save(config: Config, path: Path) -> None:
    """Write the resolved YAML in one act."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(to_yaml(config))
    os.replace(temporary, path)


def identity(config: Config) -> dict[str, Any]:
    """Flat key -> value of everything that makes this the experiment it is (architecture, contract Run)."""
    return {key: value for key, value in flatten(to_dict(config)).items() if _identifies(key)}


def circumstance(config: Config) -> dict[str, Any]:
    """Flat key -> value of everything that may change within a run."""
    return {key: value for key, value in flatten(to_dict(config)).items() if not _identifies(key)}


def digest(values: dict[str, Any]) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(earlier: dict[str, Any], later: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, earlier value, later value) of every leaf that differs; None where absent."""
    a, b = flatten(earlier), flatten(later)
    return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _identifies(key: str) -> bool:
    return (key.split(".")[0] in IDENTITY_SECTIONS or key in IDENTITY_KEYS) and key not in CIRCUMSTANCE_KEYS


def read_yaml(path: Path) -> DictConfig:
    """A YAML file by OmegaConf's reader, which refuses a key given twice and leaves dates text."""
    try:
        content = OmegaConf.create(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, for instance `train: {{steps: 100}}`")
    return content


def read_override(text: str) -> DictConfig:
    if "=" not in text:
        raise ConfigError(f"{text!r} is no override; write key=value, for instance train.steps=100")
    key = text.split("=")[0]
    if "[" in key:
        raise ConfigError(
            f"{text}: an entry of a list cannot be set alone; write the whole list, {key.split('[')[0]}=[...]"
        )
    try:
        return OmegaConf.from_dotlist([text])
    except yaml.YAMLError as error:
        raise ConfigError(f"{text}: the value is not YAML: {error}") from error


def _schema(layers: Sequence[tuple[str, DictConfig]]) -> type:
    """Config with the sections of the chosen plug-ins in place of the plain dictionaries."""
    defaults = dataclasses.asdict(Config())
    fields: list[Any] = []
    for field in dataclasses.fields(Config):
        if field.name not in knobs.FOLDERS:
            fields.append((field.name, field.type, dataclasses.field(default_factory=field.default_factory)))
            continue
        name, where = defaults[field.name]["name"], "schema"
        for place, layer in layers:
            section = layer.get(field.name)
            if isinstance(section, DictConfig) and "name" in section:
                name, where = section["name"], place
        try:
            options = knobs.options_dataclass(field.name, knobs.plugin_knobs(field.name, str(name)))
        except knobs.UnknownPlugin as error:
            raise ConfigError(f"{where}: {error}") from error
        fields.append((field.name, options, dataclasses.field(default_factory=functools.partial(options, name=name))))
    return dataclasses.make_dataclass("ResolvedConfig", fields)


def _to_config(merged: DictConfig) -> Config:
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"not set: {', '.join(missing)}; write them in the YAML file or as {missing[0]}=VALUE")
        values = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"a ${{...}} in {error.full_key or 'the configuration'} has no value: {reason}") from error
    sections = {field.name: getattr(values, field.name) for field in dataclasses.fields(Config)}
    plain: dict[str, Any] = {
        name: dataclasses.asdict(section) if name in knobs.FOLDERS else section for name, section in sections.items()
    }
    return Config(**plain)


def refuse_unknown(layer: Any, schema: Any, where: str, prefix: str = "") -> None:
    legal = [str(key) for key in schema.keys()]  # noqa: SIM118 (`in` on a DictConfig denies keys without a value)
    for key in layer.keys():  # noqa: SIM118
        if key not in legal:
            kind = prefix.removesuffix(".")
            others = switching.owners(kind, str(key)) if kind in knobs.FOLDERS else []
            if others:
                raise ConfigError(
                    f"{where}: {prefix}{key} is an option of {kind} {', '.join(others)}, and {kind} {schema['name']} has "
                    f"none of that name; remove it, or set {kind}.name={others[0]}"
                )
            near = difflib.get_close_matches(str(key), legal, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"legal here: {', '.join(legal)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}; {hint}")
        inside, expected = layer._get_node(key), schema._get_node(key)
        typed = isinstance(expected, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(expected))
        if typed and isinstance(inside, DictConfig):
            refuse_unknown(inside, expected, where, f"{prefix}{key}.")
        elif typed:
            raise ConfigError(f"{where}: {prefix}{key} is a section; write {prefix}{key}: {{KEY: VALUE}}")


def _empty_mappings(merged: Any, layer: DictConfig) -> None:
    """A mapping given as a whole (objective.roles) replaces the default one instead of being mixed with it."""
    for kind in knobs.FOLDERS:
        section = layer.get(kind)
        for key in section if isinstance(section, DictConfig) else ():
            if isinstance(section[key], DictConfig) and isinstance(merged[kind][key], DictConfig):
                merged[kind][key] = {}


def _explain(error: OmegaConfBaseException, layer: DictConfig, schema: Any) -> str:
    key = str(error.full_key or error.key or "")
    wanted = _annotation(key, schema)
    if not wanted:
        return str(error).splitlines()[0]
    return f"{key} is {OmegaConf.select(layer, key)!r}; it must be of type {wanted}"


def _annotation(key: str, schema: Any) -> str:
    """Annotation of section.name; empty where there is no such knob."""
    section, _, name = key.partition(".")
    known = schema_sections().get(section, [])
    if section in knobs.FOLDERS:
        known = knobs.plugin_knobs(section, schema[section]["name"])
    return next((knob.annotation for knob in known if knob.name == re.split(r"[.\[]", name)[0]), "")


def schema_sections() -> dict[str, list[knobs.Knob]]:
    """Knobs of every section of the schema that is not a plug-in's, by section name."""
    classes = knobs.schema_knobs(Path(__file__).with_name("schema.py"))
    names = {field.name: getattr(field.type, "__name__", "") for field in dataclasses.fields(Config)}
    return {section: classes[name] for section, name in names.items() if name in classes}


def all_knobs(config: Config) -> dict[str, list[knobs.Knob]]:
    """Every knob by section, the plug-ins' own options included."""
    plugins = {kind: knobs.plugin_knobs(kind, getattr(config, kind)["name"]) for kind in knobs.FOLDERS}
    return {**schema_sections(), **plugins}


def new_knobs(earlier: dict[str, Any], config: Config) -> dict[str, Any]:
    """Flat key -> default of the knobs of which `earlier`, written by an earlier version, says nothing."""
    flat, new = flatten(earlier), dict[str, Any]()
    for section, section_knobs in all_knobs(config).items():
        for knob in section_knobs:
            key = f"{section}.{knob.name}"
            if knob.has_default and not any(name == key or name.startswith(f"{key}.") for name in flat):
                new |= flatten({key: json_value(knob.default)})
    return new


def _redact(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _redact(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_redact(inner, key) for inner in value]
    if isinstance(value, str):
        return "***" if _SECRET.search(key) and value else _URL_QUERY.sub(r"\1=***", _URL_LOGIN.sub("***", value))
    return value
