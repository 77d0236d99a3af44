"""Recipes: those we ship load, and what is wrong with another is said in one line."""

from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import ConfigError, InputMissing
from t2v.recipe.methods import METHODS
from t2v.recipe.reading import parse_value
from t2v.recipe.recipe import dump_config, load_config, parse_config
from tests.tiny import RECIPE, tiny_config

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_shipped_recipe_loads_is_called_as_its_file_and_survives_a_dump(path, tmp_path):
    config = load_config(path)
    assert config.name == path.stem
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("ucf101_s", [1, 1, 2, 2, 3, 3]),
        ("t2v_64x288x512", [1, 2, 2, 3, 3, 4]),
        ("t2v_16x576x1024", [4, 4, 4, 4, 4, 4]),
    ],
)
def test_shipped_recipes_follow_table_8(name, blocks):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.method.model.levels_per_block == blocks
    assert (config.method.model.token_dim, config.method.model.num_latents) == (1024, 768)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("lamb", 0.005)
    assert config.optimizer.weight_decay == 0.01
    assert config.conditioning.dropout == 0.1


def message(tmp_path: Path, overrides: list[str]) -> str:
    """What is said of the tiny recipe with these changes, without the file's name."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(f"{path}: ", "")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("total_step=3", "total_step: unknown field; did you mean 'total_steps'?"),
        (
            "method.model.token_dims=8",
            "method.model.token_dims: unknown field; did you mean 'token_dim'?",
        ),
        ("method.samplings={}", "method.samplings: unknown field; did you mean 'sampling'?"),
        (
            "method.hpdm={}",
            "method.hpdm: unknown field; known here: kind, sampling, pyramid, model, diffusion, "
            "latent_budget.",
        ),
        (
            "method.kind=hpmd",
            "method.kind: value 'hpmd' is wrong because it is none of "
            f"{', '.join(map(repr, METHODS))}; correct it.",
        ),
        ("method={}", "method.kind: missing; every file is complete, add it."),
        (
            "data.sources.0.pth=a",
            "data.sources.0.pth: unknown field; did you mean 'path'?",
        ),
        (
            "conditioning.num_clases=5",
            "conditioning.num_clases: unknown field; did you mean 'num_classes'?",
        ),
        (
            "metrics.zzz=1",
            "metrics.zzz: unknown field; known here: every_steps, wandb_project, tensorboard, "
            "prometheus, prometheus_port, straggler_steps.",
        ),
        (
            "optimizer.learning_rate=1e-4",
            "optimizer.learning_rate: value '1e-4' is wrong because input should be a valid "
            "number. YAML reads '1e-4' as text; write 1.0e-4.",
        ),
        (
            "optimizer.learning_rate=1.25e4",
            "optimizer.learning_rate: value '1.25e4' is wrong because input should be a valid "
            "number. YAML reads '1.25e4' as text; write 1.25e+4.",
        ),
        (
            "optimizer.learning_rate=fast",
            "optimizer.learning_rate: value 'fast' is wrong because input should be a valid "
            "number; correct it.",
        ),
        (
            "method.diffusion.sigma_mean=.nan",
            "method.diffusion.sigma_mean: value nan is wrong because input should be a finite "
            "number; correct it.",
        ),
        (
            "total_steps=true",
            "total_steps: value True is wrong because input should be a valid integer; correct it.",
        ),
        (
            "engine.kind=ddp",
            "engine.kind: value 'ddp' is wrong because input should be 'single', 'fsdp' or 'zero'; "
            "correct it.",
        ),
        (
            "conditioning.kind=tekst",
            "conditioning.kind: value 'tekst' is wrong because it is none of 'text', 'class', "
            "'none'; correct it.",
        ),
        ("conditioning={}", "conditioning.kind: missing; every file is complete, add it."),
        (
            "method.pyramid={levels: 2, patch_size: [2, 6, 8]}",
            "method.pyramid.clip_size: missing; every file is complete, add it.",
        ),
        (
            "method.pyramid.clip_size=[4, 12, 17]",
            "method.pyramid.clip_size: 17 (width) is wrong because it does not come from "
            "patch_size 8 by the same whole factor at each of 2 levels; use 8 or 16.",
        ),
        (
            "method.model.token_size=[1, 3, 5]",
            "method.pyramid.patch_size: 8 (width) is wrong because it is no multiple of "
            "model.token_size 5; use 5 or 10.",
        ),
        (
            "method.model.levels_per_block=[2, 1]",
            "method.model.levels_per_block: [2, 1] is wrong because it does not rise from at "
            "least 1 to pyramid.levels = 2; let its last entry cover every level.",
        ),
        (
            "method.sampling.steps=[4]",
            "method.sampling.steps: [4] has 1 entries for 2 levels; give one per level.",
        ),
        (
            "method.sampling.guidance_interval=[[0, 1], [2, 0.1]]",
            "method.sampling.guidance_interval: value [2, 0.1] is wrong because it holds no noise "
            "level; write [lowest, highest].",
        ),
        (
            "micro_batch_size=3",
            "micro_batch_size: 3 is wrong because it does not divide global_batch_size 4; choose a "
            "divisor.",
        ),
        (
            "loss_weights=[1.0, 2.0, 4.0]",
            "loss_weights: [1.0, 2.0, 4.0] is wrong because the loss has 2 parts (level_0, "
            "level_1); give one number each.",
        ),
        (
            "ema_lengths=[0.05, 0.1]",
            "ema_lengths: [0.05, 0.1] is wrong because no averages are kept to make others of; set "
            "checkpoint.milestone_every_steps to about a 20th of total_steps.",
        ),
        (
            "data.sources=[{path: a, weight: 2}, {path: b}]",
            "data.sources: weights [2, 1] make 3 equal parts, which do not divide "
            "global_batch_size 4; choose weights whose parts do.",
        ),
        (
            "method.model.latent_head_dim=5",
            "method.model.latent_head_dim: 5 is wrong because it does not divide latent_dim 16; "
            "choose a divisor.",
        ),
        (
            "engine.dp_replicate=2",
            "engine.dp_replicate: 2 is wrong because engine.kind 'single' has no replicas; use 1, "
            "or kind fsdp.",
        ),
        (
            "engine={kind: single, precision: fp32, bf16_attention: true}",
            "engine.bf16_attention: true is wrong because precision 'fp32' asks for exact products"
            "; use false, or precision tf32.",
        ),
        (
            "engine={kind: zero, zero_stage: 3, activation_checkpointing: selective}",
            "engine.activation_checkpointing: 'selective' is wrong because ZeRO stage 3 gathers "
            "weights inside of blocks; use blocks, or zero_stage 2.",
        ),
        (
            "engine={kind: zero, zero_stage: 3, compile: true}",
            "engine.compile: true is wrong because ZeRO stage 3 gathers weights inside of blocks; "
            "use false, zero_stage 2, or kind fsdp.",
        ),
        (
            "engine.offload_optimizer=true",
            "engine.offload_optimizer: true is wrong because engine.kind 'single' steps where its "
            "weights are; use false, or kind zero.",
        ),
        ("foo", "foo: is not an override; write dotted.key=value."),
        ("data..seed=1", "data..seed=1: is not an override; write dotted.key=value."),
        (
            "watchdog.step_seconds=1.0e+10",
            "watchdog.step_seconds: value 10000000000.0 is wrong because input should be less than "
            "or equal to 1000000000; correct it.",
        ),
        (
            "data.num_workers=100000",
            "data.num_workers: value 100000 is wrong because input should be less than or equal to "
            "512; correct it.",
        ),
        (
            "seed=2026-99-99",
            "seed=2026-99-99: the value is not valid YAML because '2026-99-99' is no timestamp; "
            "correct or quote it.",
        ),
        (
            "data={a: 1, a: 2}",
            "data={a: 1, a: 2}: the value is not valid YAML because key 'a' is there twice; "
            "correct or quote it.",
        ),
        (
            "watchdog.step_seconds=24:00:00",
            "watchdog.step_seconds=24:00:00: the value is not valid YAML because 24:00:00 would be "
            "a number of base 60; put it in quotes; correct or quote it.",
        ),
        (
            "name=a\x1b",
            "name=a\x1b: the value is not valid YAML because '\\x1b' in it is no text; correct or "
            "quote it.",
        ),
        (
            "name.first=a",
            "name.first: cannot be set because its parent holds a value; check the path.",
        ),
        (
            "name.first.second=a",
            "name.first.second: cannot be set because 'first' is inside a value; check the path.",
        ),
        (
            "data.sources.5.path=a",
            "data.sources.5.path: '5' is no entry of a list of 1; count from 0.",
        ),
    ],
    ids=lambda value: "" if " " in value else value,
)
def test_a_mistake_is_named_with_its_remedy(override, expected, tmp_path):
    assert message(tmp_path, [override]) == expected


def test_a_tile_that_would_cut_tokens_is_refused():
    with pytest.raises(ConfigError) as caught:
        tiny_config(model={"token_size": [2, 3, 4]}, sampling={"overlap": "fhw"})
    assert str(caught.value) == (
        "tiny: method.sampling.overlap: 'f' is wrong because half of pyramid.patch_size 2 "
        "(frames) is not whole tokens of 2; leave 'f' out."
    )


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_what_needs_whole_tensors_is_refused_under_zero(tmp_path, name):
    assert message(tmp_path, ["engine.kind=zero", f"optimizer.name={name}"]) == (
        f"optimizer.name: '{name}' is wrong because ZeRO splits tensors, and LAMB and Muon need "
        "whole ones; use adamw, or engine.kind fsdp."
    )


def test_a_hang_is_found_before_those_that_wait_give_up():
    watchdog = {"step_seconds": 900.0}
    assert tiny_config(watchdog=watchdog).watchdog.step_seconds == 900.0
    message = r"watchdog\.step_seconds: 900 is wrong because ranks wait"
    with pytest.raises(ConfigError, match=message):
        tiny_config(watchdog=watchdog, engine={"kind": "fsdp"})


def test_all_mistakes_are_told_at_once(tmp_path):
    lines = message(tmp_path, ["seed=-1", "total_step=3"]).splitlines()
    assert lines == [
        "seed: value -1 is wrong because input should be greater than or equal to 0; correct it.",
        "total_step: unknown field; did you mean 'total_steps'?",
    ]


@pytest.mark.parametrize("name", ["seed", "method"])
def test_a_missing_field_is_named(name):
    content = {key: value for key, value in RECIPE.items() if key != name}
    with pytest.raises(ConfigError) as caught:
        parse_config(content, "recipe.yaml")
    assert str(caught.value) == f"recipe.yaml: {name}: missing; every file is complete, add it."


def test_a_recipe_from_before_there_were_methods_is_told_the_new_form(tmp_path):
    method = RECIPE["method"]
    old = {key: value for key, value in RECIPE.items() if key != "method"}
    old |= {key: value for key, value in method.items() if key != "kind"}
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(old))
    form = (
        "wrong at the top because a method's settings stand in its section; write `method: {kind: "
        "hpdm, pyramid: ..., model: ..., diffusion: ..., sampling: ...}`."
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: pyramid, model, diffusion, sampling: {form}"
    # So is one old override of a new recipe.
    assert message(tmp_path, ["model.token_dim=8"]) == f"model: {form}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [", "is not valid YAML at line 1 because"),
        ("seed: 1\nseed: 2", "is not valid YAML at line 2 because key 'seed' is there twice"),
        ("1: 2", "is not valid YAML at line 1 because key 1 is no text; correct it."),
        ("- 1", "is wrong because it holds no mapping; see configs/."),
        ("a: \x00", r"is not valid YAML because '\x00' in it is no text; correct it."),
        ("a: 1\n---\nb: 2", "is not valid YAML at line 2 because expected a single document in"),
        (
            "a: &x {b: 1}\nc:\n  <<: *x",
            "is not valid YAML at line 3 because '<<' is not read here;",
        ),
        (b"\xff\xfe\x00", "is not valid YAML because it is not UTF-8 text; correct it."),
        ("seed: 2026-99-99", "is not valid YAML at line 1 because '2026-99-99' is no timestamp;"),
        ("a: 1\nseed: !!int b", "is not valid YAML at line 2 because 'b' is no int; correct it."),
        ("seed: " + 5000 * "1", "is not valid YAML at line 1 because '1111"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML at line 1 because could"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(content, expected, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_missing_input(tmp_path):
    with pytest.raises(InputMissing, match=r"no such recipe; `ls configs` shows those we ship\."):
        load_config(tmp_path / "none.yaml")


def test_overrides_reach_into_sections_lists_and_absent_sections(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    config = load_config(
        path,
        [
            "total_steps=7",
            "optimizer.learning_rate=1.0e-4",
            "data.sources.0.path=s3://bucket/set=1",
            "method.sampling.steps=[3, 1]",
            "warm_start.checkpoint=runs/base",
        ],
    )
    assert config.total_steps == 7
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.sources[0].path == "s3://bucket/set=1"
    assert config.method.sampling.steps == [3, 1]
    assert config.warm_start.checkpoint == "runs/base"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/x/run #1", "/x/run #1"),
        ("'/x/run #1'", "/x/run #1"),
        ("#1", None),
        ("3 # three", 3),
        ("[a, b]", ["a", "b"]),
    ],
)
def test_a_value_of_the_command_line_keeps_its_end(text, value):
    assert parse_value(text, "here") == value
