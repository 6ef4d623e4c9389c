"""What a run has cost so far, and what it will cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from hermes_pipeline.config import Range

Money = Annotated[float, Range(low=0)]


@dataclass(frozen=True, slots=True)
class Prices:
    """[prices]: money for a million tokens, in any currency."""

    prompt: Money = 0.0
    completion: Money = 0.0
    max_cost: Money | None = None  # no further request once the answers have cost so much

    def __post_init__(self) -> None:
        if self.max_cost is not None and not self.are_given:
            raise ValueError("max_cost wants prices: give prompt and completion, too")

    @property
    def are_given(self) -> bool:
        return self.prompt > 0 or self.completion > 0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(slots=True)
class Usage:
    """What requests have cost so far.

    Each one that has begun is answered, failed, cancelled or in flight.
    """

    requests: int = 0  # answered ones
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_squares: int = 0  # sums of squares, for the margin of a forecast
    completion_squares: int = 0
    failed: int = 0  # for good
    cancelled: int = 0
    in_flight: int = 0  # or waiting to be sent again
    retries: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def add(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.prompt_squares += prompt_tokens**2
        self.completion_squares += completion_tokens**2

    def cost(self, prices: Prices) -> float:
        """Money for what was answered; tries that failed are not in it."""
        return prices.cost(self.prompt_tokens, self.completion_tokens)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will cost; margins hold for about 19 runs in 20 of requests like the pilot's."""

    requests: int  # to be answered
    sent: float  # tries in all
    prompt_tokens: float
    prompt_margin: float
    completion_tokens: float
    completion_margin: float
    cost: float  # 0 without prices
    cost_margin: float

    def __str__(self) -> str:
        parts = [
            f"about {self.sent:,.0f} requests",
            f"{self.prompt_tokens:,.0f} tokens of prompts",
            f"{self.completion_tokens:,.0f} ± {self.completion_margin:,.0f} of answers",
        ]
        money = f", {self.cost:,.2f} ± {self.cost_margin:,.2f} in money" if self.cost else ""
        return ", ".join(parts) + money


def forecast(pilot: Usage, requests: int, prices: Prices) -> Forecast:
    """The cost of ``requests`` more requests like those of a pilot, drawn at random for it.

    Raises:
        ValueError: the pilot has fewer than two answers.
    """
    if pilot.requests < 2:
        raise ValueError(f"a pilot of {pilot.requests} answers tells no spread; it wants two")
    prompt, prompt_margin = _total(
        pilot.prompt_tokens, pilot.prompt_squares, pilot.requests, requests
    )
    completion, completion_margin = _total(
        pilot.completion_tokens, pilot.completion_squares, pilot.requests, requests
    )
    return Forecast(
        requests=requests,
        sent=requests * (1 + pilot.retries / pilot.requests),
        prompt_tokens=prompt,
        prompt_margin=prompt_margin,
        completion_tokens=completion,
        completion_margin=completion_margin,
        cost=prices.cost(prompt, completion),
        # Long prompts may go with long answers: margins add up.
        cost_margin=prices.cost(prompt_margin, completion_margin),
    )


def _total(total: float, squares: float, count: int, wanted: int) -> tuple[float, float]:
    """Expected total of ``wanted`` more values, and two standard errors of it."""
    mean = total / count
    variance = max(0.0, squares - count * mean**2) / (count - 1)
    return wanted * mean, 2 * math.sqrt(variance * wanted * (1 + wanted / count))
