"""What a run costs: counted, and told before it starts."""

from __future__ import annotations

import random

import pytest

from hermes_pipeline.services.account import Prices, Usage, forecast


def usage_of(*tokens: tuple[int, int]) -> Usage:
    usage = Usage()
    for prompt, completion in tokens:
        usage.add(prompt, completion)
    return usage


def test_money_is_tokens_times_the_price_of_a_million() -> None:
    usage = usage_of((1000, 500), (3000, 1500))
    assert usage.cost(Prices(prompt=2.5, completion=10)) == pytest.approx(0.01 + 0.02)


def test_a_forecast_by_hand() -> None:
    pilot = usage_of((100, 10), (100, 30))
    pilot.retries = 1
    told = forecast(pilot, 1000, Prices(prompt=1, completion=10))
    assert (told.requests, told.sent) == (1000, 1500)
    assert (told.prompt_tokens, told.prompt_margin) == (100_000, 0)
    # Variance 200; of the total of 1,000 more: 200 x 1,000 x (1 + 1,000 / 2).
    assert told.completion_tokens == 20_000
    assert told.completion_margin == pytest.approx(2 * (200 * 1000 * 501) ** 0.5)
    assert told.cost == pytest.approx(0.1 + 0.2)
    assert told.cost_margin == pytest.approx(told.completion_margin * 1e-5)


def test_without_prices_a_forecast_names_no_money() -> None:
    assert "money" not in str(forecast(usage_of((1, 1), (1, 1)), 5, Prices()))


def test_one_answer_is_no_pilot() -> None:
    with pytest.raises(ValueError, match="a pilot of 1 answers"):
        forecast(usage_of((1, 1)), 5, Prices())


def test_nineteen_forecasts_in_twenty_hold() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(200):
        pilot = usage_of(*((100, round(draw.lognormvariate(6, 0.8))) for _ in range(50)))
        run = usage_of(*((100, round(draw.lognormvariate(6, 0.8))) for _ in range(500)))
        told = forecast(pilot, 500, Prices())
        held += abs(told.completion_tokens - run.completion_tokens) <= told.completion_margin
    assert held >= 180
