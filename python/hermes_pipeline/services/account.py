"""What a run has cost so far, and what it will cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from hermes_pipeline.services.wire import Answer


@dataclass(frozen=True, slots=True)
class Prices:
    """Money for a million tokens, in any currency."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(slots=True)
class Usage:
    """What an endpoint has cost so far; every request begun is in one of the first four counts."""

    requests: int = 0  # answered ones
    failed: int = 0  # for good
    cancelled: int = 0
    in_flight: int = 0  # or waiting to be sent again
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_squares: int = 0  # sums of squares, for the margin of a forecast
    completion_squares: int = 0
    begun_at: float | None = None  # `time.monotonic()` of the first request

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def begin(self) -> None:
        self.in_flight += 1
        if self.begun_at is None:
            self.begun_at = time.monotonic()

    def add(self, answer: Answer) -> None:
        self.requests += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.prompt_squares += answer.prompt_tokens**2
        self.completion_squares += answer.completion_tokens**2

    def completion_tokens_per_s(self) -> float:
        """Tokens written for each second since the first request; 0 before it."""
        if self.begun_at is None:
            return 0.0
        return self.completion_tokens / max(1e-9, time.monotonic() - self.begun_at)

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
    cost: float | None = None  # None without prices
    cost_margin: float | None = None


def forecast(pilot: Usage, requests: int, prices: Prices | None = None) -> Forecast:
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
        cost=None if prices is None else prices.cost(prompt, completion),
        # Long prompts may go with long answers: margins add up.
        cost_margin=None if prices is None else prices.cost(prompt_margin, completion_margin),
    )


def _total(total: float, squares: float, count: int, wanted: int) -> tuple[float, float]:
    """Expected total of ``wanted`` more values, and two standard errors of it."""
    mean = total / count
    variance = max(0.0, squares - count * mean**2) / (count - 1)
    return wanted * mean, 2 * math.sqrt(variance * wanted * (1 + wanted / count))
