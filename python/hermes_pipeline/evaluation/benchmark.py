"""What a benchmark is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hermes_pipeline.records import Prompt, Trace, Verdict

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Benchmark(Generic[Item]):
    """A set of items, how each is asked, and how an answer is judged.

    Attributes:
        items: loads or makes the items, the same ones in the same order each time.
        prompt: an item as messages, with a key of its own and the target.
        score: the verdict on one trace; may take its time, must not look at other traces.
        draws: answers for each item when nobody says otherwise.
    """

    name: str
    items: Callable[[], Iterable[Item]]
    prompt: Callable[[Item], Prompt]
    score: Callable[[Trace, Prompt], Verdict]
    draws: int = 1
