"""What a run has cost and will cost, what is said of it while it goes on, and where it ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from hermes_pipeline.sampling.draw import Draw, Tally
from hermes_pipeline.services.account import Forecast, Prices, Usage, forecast
from hermes_pipeline.services.progress import Tell

RATE_LOOKS = 20  # tokens/s are those of so many looks


class Spending:
    """The account of a run, with what earlier runs in its folder have cost.

    Attributes:
        used_up: were draws left out because the answers have cost ``prices.max_cost``?
    """

    def __init__(self, prices: Prices, before: Usage, tally: Tally) -> None:
        self.prices, self.tally = prices, tally
        self.used_up = False
        self._before = before

    @property
    def cost(self) -> float:
        """Money for all answers that are kept."""
        return self._before.cost(self.prices) + self.tally.usage.cost(self.prices)

    def forecast(self, left: int) -> Forecast | None:
        """The cost of ``left`` more draws, from those of this run, or of earlier ones."""
        usage = max(self.tally.usage, self._before, key=lambda usage: usage.requests)
        return forecast(usage, left, self.prices) if usage.requests > 1 and left > 0 else None

    @property
    def is_blind(self) -> bool:
        """Is there a limit, and no answer yet that tells what one costs?"""
        return self.prices.max_cost is not None and self.forecast(1) is None

    def keep_within(self, draws: Iterable[Draw | None]) -> Iterator[Draw | None]:
        """The draws, as long as there is money for them and for those in flight."""
        limit = self.prices.max_cost
        for draw in draws:
            if draw is not None and limit is not None and self._committed >= limit:
                self.used_up = True
                return
            yield draw

    @property
    def _committed(self) -> float:
        """Money for what is answered and for what is in flight."""
        told = self.forecast(self.tally.in_flight)
        return self.cost + (told.cost if told else 0.0)


class Show:
    """Tells what has become of the draws, whenever it is called.

    Args:
        left: draws to be had.
        passed_over: how many of them have turned out to be none.
    """

    def __init__(
        self,
        tell: Tell,
        spending: Spending,
        left: int,
        passed_over: Callable[[], int],
    ) -> None:
        self.spending = spending
        self._tell, self._left, self._passed_over = tell, left, passed_over
        self._shown = self._fewer = 0
        self._looks = deque([(time.monotonic(), 0)], maxlen=RATE_LOOKS)

    def __call__(self) -> None:
        tally, spending = self.spending.tally, self.spending
        self._looks.append((time.monotonic(), tally.usage.completion_tokens))
        (then, before), (now, tokens) = self._looks[0], self._looks[-1]
        figures = {
            "set_aside": tally.set_aside,
            "in_flight": tally.in_flight,
            "tokens_per_s": round((tokens - before) / max(1e-3, now - then), 1),
        }
        done, fewer = tally.kept + tally.set_aside, self._passed_over()
        if spending.prices.are_given:
            told = spending.forecast(self._left - done - fewer)
            figures["cost"] = round(spending.cost, 6)
            figures["cost_expected"] = round(spending.cost + (told.cost if told else 0.0), 6)
        self._tell(done - self._shown, figures, fewer=fewer - self._fewer)
        self._shown, self._fewer = done, fewer


def describe(figures: Mapping[str, float]) -> str:
    """The figures as a remark for people."""
    failed = f"{figures['set_aside']:,} set aside, " if figures["set_aside"] else ""
    text = f"{failed}{figures['in_flight']:,} in flight, {figures['tokens_per_s']:,.0f} tokens/s"
    if "cost" in figures:
        text += f", cost {figures['cost']:,.2f} of about {figures['cost_expected']:,.2f}"
    return text
