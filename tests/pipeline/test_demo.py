"""`hermes4 demo`: what its seed decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.stages import demo
from hermes_pipeline.training.recipes import load_recipe
from running import Hermes4

SEED = 3


def test_the_plan_of_the_report_is_the_order_of_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planned: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    monkeypatch.setattr(demo.pack, "run", lambda *_, **options: planned.update(options))
    monkeypatch.setattr(demo.train, "run", lambda *_, **options: trained.update(options))
    for step in (*demo.data_steps(tmp_path, SEED), *demo.model_steps(tmp_path, SEED)):
        if step.name in ("pack", "train"):
            step.work()
    data = load_recipe(demo.RECIPE, trained["settings"]).data
    assert planned["seed"] == data.seed == SEED
    assert planned["row_length"] == data.row_length
    assert (planned["strategy"], planned["too_long"]) == (data.packing, data.too_long)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_training_cannot_take_is_refused_before_anything_is_made(
    hermes4: Hermes4, tmp_path: Path, seed: int
) -> None:
    ended = hermes4("demo", "--out", tmp_path / "demo", "--seed", seed)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "--seed" in ended.err
    with pytest.raises(UserError, match=rf"--seed is {seed}, want 0 to 2147483647"):
        demo.run(tmp_path / "demo", seed=seed)
    assert not (tmp_path / "demo").exists()
