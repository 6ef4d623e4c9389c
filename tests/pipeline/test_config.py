"""TOML to frozen dataclasses, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hermes_pipeline import config
from hermes_pipeline.config import find_recipe, recipe_names
from hermes_pipeline.errors import UserError
from hermes_pipeline.training.recipes import Recipe, load_recipe


def tiny_text() -> str:
    return find_recipe("tiny").read_text()


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_recipes_are_found_by_name() -> None:
    assert {"hermes4_14b", "hermes4_70b", "hermes4_405b", "tiny"} <= set(recipe_names())


def test_recipe_is_found_by_path(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, tiny_text())) == load_recipe("tiny")


def test_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"did you mean 'hermes4_14b'.*hermes4_405b.*tiny"):
        load_recipe("hermes4_14")


def test_missing_recipe_file_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no recipe file nowhere/x\.toml.*tiny"):
        load_recipe("nowhere/x.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "warmup_steps",
            "warmup_step",
            r"recipe mine.toml: unknown key 'warmup_step' in \[optimizer\]; "
            "did you mean 'warmup_steps'",
        ),
        ("[training]", "[traning]", r"unknown section \[traning\]; did you mean 'training'"),
        ("steps = 600", "steps = 6.5", r"training\.steps must be an integer, got 6\.5"),
        ("steps = 600", "steps = true", r"training\.steps must be an integer, got True"),
        ("steps = 600", "steps = 0", r"training\.steps is 0, but must be at least 1"),
        ("learning_rate = 1e-2", "learning_rate = nan", r"is nan, but must be a finite number"),
        (
            "learning_rate = 1e-2",
            "learning_rate = 0",
            r"learning_rate is 0\.0, but must be above 0",
        ),
        ("learning_rate = 1e-2", "learning_rate = 1e39", r"above 0 and at most 3\.4e\+38"),
        ("eps = 1e-8", "eps = 1e-300", r"optimizer\.eps is 1e-300, but must be between 1\.2e-38"),
        ("weight_decay = 0.1", "weight_decay = 1e300", r"weight_decay is 1e\+300, but must be bet"),
        ("timeout_s = 300", "timeout_s = 10_000_000_000", r"timeout_s is 10000000000, but must"),
        ("rows = 16", "rows = 9_000_000_000_000", r"rows is 9000000000000, but must be between 1"),
        ("learning_rate = 1e-2", 'learning_rate = "x"', r"learning_rate must be a number, got 'x'"),
        ("tied = false", "tied = 0", r"model\.tied must be true or false, got 0"),
        ('"drop"', '"dropp"', r"too_long is 'dropp', not one of 'error', 'drop', 'truncate'"),
        ("eps = 1e-8", "", r"optimizer\.eps is missing"),
        ("[run]", "[run", "not valid TOML"),
        ("warmup_steps = 20 ", "warmup_steps = 700 ", "longer than the learning-rate schedule"),
        ("shard = -1", "shard = 0", "shard must be at least 1, or -1"),
    ],
)
def test_bad_recipe_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in tiny_text()
    with pytest.raises(UserError, match=message):
        load_recipe(written(tmp_path, tiny_text().replace(old, new, 1)))


def test_section_that_is_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\[data\] must be a section, not a value"):
        load_recipe(written(tmp_path, "data = 3"))


def test_setting_overrides_the_recipe() -> None:
    recipe = load_recipe(
        "tiny",
        ["training.steps=7", "optimizer.warmup_steps=2", "data.store=/some/where", "data.rows= 8"],
    )
    assert recipe.training.steps == 7
    assert recipe.data.store == "/some/where"
    assert recipe.data.rows == 8


def test_setting_takes_toml_values() -> None:
    recipe = load_recipe("tiny", ["model.tied=true", 'data.too_long="error"', "optimizer.eps=1e-9"])
    assert (recipe.model.tied, recipe.data.too_long, recipe.optimizer.eps) == (True, "error", 1e-9)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.step=7", "unknown key 'step' in .training.; did you mean 'steps'"),
        ("train.steps=7", "unknown section 'train'; did you mean 'training'"),
        ("optimizer.steps=7", r"unknown key 'steps' in \[optimizer\]; it belongs to \[training\]"),
        ("steps=7", "write it as section.key=value"),
        ("training.steps", "write it as section.key=value"),
        ("training.steps=seven", "training.steps must be an integer, got 'seven'"),
        ("training.steps=1\ntraining.seed=2", "must be an integer"),
        ("training.steps=-3", "training.steps is -3, but must be at least 1"),
        ("optimizer.eps=inf", "optimizer.eps is inf, but must be a finite number"),
    ],
)
def test_bad_setting_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("tiny", [setting])


def test_flatten_and_unflatten_are_inverse() -> None:
    recipe = load_recipe("hermes4_70b")
    assert config.build(Recipe, config.unflatten(config.flatten(recipe)), "test") == recipe
