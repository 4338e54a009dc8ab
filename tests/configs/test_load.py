"""Strict loading: what is wrong is said with its place and its remedy; what is right survives a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import load
from configs.load import ConfigError
from configs.schema import Config

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
OVERLAYS = ("cluster", "engine", "lora", "objective")  # what stands behind a recipe
RECIPES = sorted(path for path in SMOKE.parent.rglob("*.yaml") if path.parent.name not in OVERLAYS)


def smoke(*overrides: str) -> Config:
    return load.load([SMOKE], overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_loads(path: Path) -> None:
    config = load.load([path])
    for overlay in (SMOKE.parent / "lora").glob("*.yaml") if config.lora.rank else ():
        assert load.load([path, overlay]).objective["order"] == 1
    if config.objective["name"] == "twinflow":
        of_captions = load.load([path, SMOKE.parent / "objective" / "image_free.yaml"])
        assert of_captions.objective["image_free"] and of_captions.objective["teacher"] == "frozen"
        jumping = load.load([path, SMOKE.parent / "objective" / "warm_start.yaml"])
        assert jumping.objective["time_distribution"] == "logit_normal" and jumping.objective["time_mean"] == 0.5


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stps=3", "unknown key train.stps; did you mean train.steps"),
        ("trian.steps=3", "unknown key trian; did you mean train"),
        ("objective.ordr=1", "unknown key objective.ordr; did you mean objective.order"),
        ("zzz=1", "legal here: run, model, objective"),
        ("train.steps=many", "train.steps is 'many'; it must be of type int"),
        ("objective.order=high", "objective.order is 'high'; it must be of type int"),
        ("objective.roles=3", r"must be of type dict\[str, int\]"),
        ("engine=fsdp2", "engine is a section"),
        ("objective.name=gan", "choose one of flow_matching, rcgm, twinflow"),
        ("steps", "write key=value"),
        ("run.name=null", "run.name is None; it must be of type str"),
        ("sample.prompts=[a, b", "the value is not YAML"),
        ("sample.prompts[0]=x", r"write the whole list, sample\.prompts=\[\.\.\.\]"),
        ("tracking.uri=${oc.env:NO_SUCH_VARIABLE}", r"tracking\.uri has no value: .*NO_SUCH_VARIABLE"),
        ("tracking.uri=${no.such.key}", r"has no value: .*no\.such\.key"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        smoke(override)


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {micro_batch: 3}\n")
    with pytest.raises(
        ConfigError, match=r"mine\.yaml: unknown key train\.micro_batch; did you mean train\.micro_batch_size"
    ):
        load.load([SMOKE, path])
    path.write_text("train: [1, 2\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load.load([path])
    path.write_text("train: {steps: 5}\ntrain: {micro_batch_size: 8}\n")
    with pytest.raises(ConfigError, match="duplicate key train"):
        load.load([SMOKE, path])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not YAML"):
        load.load([path])
    with pytest.raises(ConfigError, match="No such file"):
        load.load([tmp_path / "absent.yaml"])


def test_what_is_missing_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "few.yaml"
    path.write_text("run: {name: few}\n")
    with pytest.raises(ConfigError, match=r"not set: train\.global_batch_size"):
        load.load([path])


def test_later_layers_win(tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("train: {steps: 200}\noptimizer: {betas: [0.5, 0.9]}\n")
    config = load.load([SMOKE, later], ["train.steps=300"])
    assert config.train.steps == 300 and tuple(config.optimizer.betas) == (0.5, 0.9)
    assert config.train.global_batch_size == 64


def test_a_mapping_replaces_the_default_and_one_entry_changes_it() -> None:
    assert smoke("objective.roles={any: 1}").objective["roles"] == {"any": 1}
    assert smoke("objective.roles.e2e=2").objective["roles"] == {"e2e": 2, "mul": 3, "any": 3, "adv": 1}


def test_a_mapping_replaces_the_default_wherever_its_file_lies(tmp_path: Path) -> None:
    file = tmp_path / "v1.2" / "only.any.yaml"
    file.parent.mkdir()
    file.write_text("objective: {roles: {any: 1}}\n")
    assert load.load([SMOKE, file]).objective["roles"] == {"any": 1}


def test_the_resolved_configuration_loads_to_itself(tmp_path: Path) -> None:
    config = smoke("guidance.scale=5", "objective.time_std=1.5")
    load.save(config, tmp_path / "config.yaml")
    assert load.load([tmp_path / "config.yaml"]) == config


def test_an_environment_variable_may_hold_a_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACKER", "https://tracker:5000")
    path = tmp_path / "dated.yaml"
    path.write_text("run: {name: 2026-11-20}\ntracking: {uri: '${oc.env:TRACKER}'}\n")
    config = load.load([SMOKE, path])
    assert config.run.name == "2026-11-20" and config.tracking.uri == "https://tracker:5000"


@pytest.mark.parametrize(
    "prompt",
    [
        "${oc.env:HUB_TOKEN}",
        "costs ${price} or $5",
        "${",
        r"a\\b \${oc.env:HUB_TOKEN} \\${x} c\\",
        r"\\\${oc.env:HUB_TOKEN}",
    ],
)
def test_recorded_values_are_literal(monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    """A checkpoint may be a stranger's: what it says is neither an expression nor an error."""
    monkeypatch.setenv("HUB_TOKEN", "hunter2")
    recorded = load.to_dict(smoke())
    recorded["sample"]["prompts"] = [prompt]
    recorded["model"]["path"] = prompt
    config = load.load([], ["run.dir=${oc.env:HUB_TOKEN}"], recorded)
    assert config.model["path"] == prompt and list(config.sample.prompts) == [prompt]
    assert config.run.dir == "hunter2"  # the user's own may


@pytest.mark.parametrize(
    "uri, shown",
    [
        ("https://token@host/x", "https://***@host/x"),
        ("postgresql://me:p@ss@db:1/x", "postgresql://***@db:1/x"),
        ("https://host/x?api_key=abc&a=1", "https://host/x?api_key=***&a=1"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
    ],
)
def test_logins_inside_addresses_are_redacted(uri: str, shown: str) -> None:
    assert load.to_dict(smoke(f"tracking.uri={uri}"))["tracking"]["uri"] == shown


def test_secrets_are_redacted() -> None:
    config = smoke("tracking.uri=https://me:hunter2@host/x", "data.endpoint_url=http://key:word@127.0.0.1:9000")
    text = load.to_yaml(config)
    assert "hunter2" not in text and "word@" not in text and "https://***@host/x" in text
    assert "hunter2" not in str(load.circumstance(config))


def test_identity_is_the_experiment_and_circumstance_the_rest() -> None:
    base = smoke()
    for override in ("objective.order=1", "run.seed=1", "train.steps=99", "optimizer.learning_rate=1", "data.lanes=4"):
        assert load.identity(smoke(override)) != load.identity(base), override
    for override in (
        "engine.keep_gathered=false",
        "train.micro_batch_size=4",
        "runtime.nproc=1",
        "model.path=x",
        "run.name=y",
    ):
        assert load.identity(smoke(override)) == load.identity(base), override
    assert not load.identity(base).keys() & load.circumstance(base).keys()


def test_differences_are_listed_leaf_by_leaf() -> None:
    a, b = (
        load.to_dict(smoke()),
        load.to_dict(smoke("objective.roles={any: 1}", "train.steps=9", "schedule.warmup_steps=1")),
    )
    changes = {key: (old, new) for key, old, new in load.difference(a, b)}
    assert changes["train.steps"] == (1000, 9)
    assert changes["objective.roles.e2e"] == (1, None)
    assert load.difference(a, a) == []
    assert load.digest(load.identity(smoke())) == load.digest(load.identity(smoke("runtime.threads=2")))


def test_sources_are_a_list_of_manifests_with_weights() -> None:
    sources = "[{manifest: a}, {manifest: s3://b/c, weight: 2.5}]"
    config = load.load([SMOKE], ["data.manifest=null", f"data.sources={sources}"])
    assert [(source.manifest, source.weight) for source in config.data.sources] == [("a", 1.0), ("s3://b/c", 2.5)]
    assert load.to_dict(config)["data"]["sources"][1] == {"manifest": "s3://b/c", "weight": 2.5}
    with pytest.raises(ConfigError, match="wieght"):
        load.load([SMOKE], ["data.manifest=null", "data.sources=[{manifest: a, wieght: 2}]"])
    with pytest.raises(ConfigError, match=r"not set: data\.sources\[0\]\.manifest"):
        load.load([SMOKE], ["data.manifest=null", "data.sources=[{weight: 2}]"])
