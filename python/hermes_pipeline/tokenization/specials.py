"""Special tokens as texts: where a template ends a turn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# An opening and the closing text that differs from it by one of these.
_PAIRS = (
    ("/", ""),
    ("end", "start"),
    ("end", "begin"),
    ("END", "START"),
    ("END", "BEGIN"),
    ("suffix", "prefix"),
    ("close", "open"),
    ("_end", ""),
)
# Ends of turns that released models use beside their tokenizer's eos_token.
_KNOWN_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|eot|>",
        "<|eos|>",
        "</s>",
        "<eos>",
        "<end_of_turn>",
        "<turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|end_of_turn|>",
        "<｜end▁of▁sentence｜>",
        "<|end_of_sentence|>",
        "[e~[",
        "<|role_end|>",
    }
)


@dataclass(frozen=True, slots=True)
class End:
    """An end-of-turn token at [start, end) of some text."""

    token: str
    start: int
    end: int


class Specials:
    """The special tokens of a tokenizer.

    Args:
        tokens: their texts.
        eos: the tokenizer's own end token.
    """

    def __init__(self, tokens: Iterable[str], eos: str | None) -> None:
        ordered = sorted({token for token in tokens if token}, key=lambda t: (-len(t), t))
        self.eos = eos
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def is_known_end(self, token: str) -> bool:
        """Is ``token`` known to end a turn, whatever stands around it?"""
        return token == self.eos or token in _KNOWN_ENDS

    def within(self, text: str) -> list[str]:
        """Return the special tokens in ``text``, in order."""
        return self._pattern.findall(text)

    def common_prefix(self, one: str, other: str) -> int:
        """Return how many characters both share, special tokens of ``one`` left whole."""
        count = common_prefix(one, other)
        # A token across the cut starts less than the longest token before it.
        for found in self._pattern.finditer(one, max(0, count - 256)):
            if found.start() < count < found.end():
                return found.start()
            if found.start() >= count:
                break
        return count

    def first_end(self, tail: str, before: str) -> End | None:
        """Return the first special token of ``tail`` that closes nothing opened in the turn.

        ``before`` is what the template wrote in the turn ahead of ``tail``: the closing tag of a
        tool call or of a thought is no end of turn, even where it is a special token.
        """
        for found in self._pattern.finditer(tail):
            token = found[0]
            written = before + tail[: found.start()]
            opened = max((written.count(opening) for opening in _openings(token)), default=0)
            if opened <= written.count(token):
                return End(token, found.start(), found.end())
        return None


def common_prefix(one: str, other: str) -> int:
    """Return how many characters both texts share at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _openings(token: str) -> set[str]:
    """Return the texts that ``token`` may close."""
    openings = set()
    for closing, opening in _PAIRS:
        start = token.find(closing)
        while start >= 0:
            openings.add(token[:start] + opening + token[start + len(closing) :])
            start = token.find(closing, start + 1)
    return openings
