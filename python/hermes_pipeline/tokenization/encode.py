"""Text to token ids, with token boundaries at the edges of what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from hermes_pipeline.chat import Refused
from hermes_pipeline.records import Span


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a text and the characters [start, stop) of each, all [T]."""

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]  # with the characters before it that no token covers
    covered: NDArray[np.int64]  # the first character that it covers itself
    stops: NDArray[np.int64]


class Encoder:
    """A tokenizer without padding, truncation or added special tokens.

    Args:
        state: the backend tokenizer as JSON.
    """

    def __init__(self, state: str) -> None:
        self._backend = Tokenizer.from_str(state)
        self._backend.no_padding()
        self._backend.no_truncation()
        # Post-processors add special tokens and, in byte-level ones, trim white space off the
        # offsets; ids without special tokens are the same without them.
        self._backend.post_processor = None
        # Ids may have gaps, so the count of tokens is not enough.
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self._splits_cleanly = self._pieces_join()

    def token_id(self, token: str) -> int | None:
        """Return the id of ``token``, None if the vocabulary has no such token."""
        return self._backend.token_to_id(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def encode(
        self, text: str, kept: Sequence[Span], ends: Sequence[tuple[int, str]]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return token ids [T] and kept spans [M, 2] of tokens.

        Where a token would lie across an edge of ``kept`` the text is cut there, as it is at
        inference, where the prompt is tokenized on its own. So it is before a character that no
        token covers, since a normalizer may have drawn it into the token before. An end-of-turn
        token that swallows the white space after it stays whole.

        Args:
            kept: characters to keep; disjoint and rising.
            ends: place after each end-of-turn token that is kept, and the token.

        Raises:
            Refused: an edge cannot be cut, or an end-of-turn token is not one token.
        """
        ending = dict(ends)
        edges = sorted({edge for span in kept for edge in span})
        cuts: set[int] = set()
        while True:
            tokens = self._encode_pieces(text, sorted(cuts))
            ids = tokens.ids
            crossed = {edge for edge in edges if self._is_crossed(edge, tokens, text, ending)}
            if not crossed - cuts:
                break
            if not self._splits_cleanly:
                raise Refused(
                    "a token would lie across the edge of an assistant turn, and this tokenizer "
                    "cannot cut there: it adds a space to each text"
                )
            cuts |= crossed
        spans = np.empty((len(kept), 2), dtype=np.uint32)
        for row, (start, end) in enumerate(kept):
            low = int(np.searchsorted(tokens.starts, start, side="left"))
            high = int(np.searchsorted(tokens.stops, end, side="right"))
            if end in ending:
                # Across the edge only when it swallows white space.
                high += high < len(ids) and tokens.starts[high] < end
                if high == 0 or ids[high - 1] != self.token_id(ending[end]):
                    raise Refused(
                        f"the end-of-turn token {ending[end]!r} does not become one token"
                    )
            spans[row] = low, high
        return ids, _merged(spans)

    def _encode_pieces(self, text: str, cuts: Sequence[int]) -> _Tokens:
        ids: list[NDArray[np.uint32]] = []
        offsets: list[NDArray[np.int64]] = []
        pieces: list[NDArray[np.int64]] = []  # where the piece of each token begins
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            encoding = self._backend.encode(text[start:end], add_special_tokens=False)
            ids.append(np.asarray(encoding.ids, dtype=np.uint32))
            offsets.append(np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start)
            pieces.append(np.full(len(encoding.ids), start))
        joined = np.concatenate(offsets)
        stops = np.maximum.accumulate(joined[:, 1]) if len(joined) else joined[:, 1]
        # Characters that no token covers belong to the token after them, but not across a cut.
        before = np.concatenate([[0], stops[:-1]]) if len(stops) else stops
        before = np.maximum(before, np.concatenate(pieces))
        starts = np.minimum(joined[:, 0], before)
        return _Tokens(np.concatenate(ids), starts, joined[:, 0], stops)

    def _is_crossed(self, edge: int, tokens: _Tokens, text: str, ending: Mapping[int, str]) -> bool:
        token = int(np.searchsorted(tokens.stops, edge, side="right"))
        if edge in ending:
            if token == len(tokens.ids) or tokens.ids[token] == self.token_id(ending[edge]):
                return False
            return bool(tokens.starts[token] < edge)
        if token == len(tokens.ids):
            return edge < len(text)
        return bool(tokens.starts[token] < edge or tokens.covered[token] > edge)

    def _pieces_join(self) -> bool:
        """Does the text of two encodings in a row equal the two texts in a row?"""
        ids = [
            token
            for text in ("ab", "cd")
            for token in self._backend.encode(text, add_special_tokens=False).ids
        ]
        return self.decode(ids).strip() == "abcd"


def _merged(spans: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Drop empty spans and join those that touch."""
    merged: list[list[int]] = []
    for start, end in spans.tolist():
        if start == end:
            continue
        if merged and merged[-1][1] == start:
            merged[-1][1] = end
        else:
            merged.append([start, end])
    return np.asarray(merged, dtype=np.uint32).reshape(-1, 2)
