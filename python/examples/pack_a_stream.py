"""Pack samples while they are read: rows leave as soon as they are full, in the data's order.

    python pack_a_stream.py STORE

Memory holds a few windows of samples, however long the stream is. Here it comes from a token
store; any iterable of token ids and loss masks will do.
"""

import sys
from collections.abc import Iterable, Iterator

import numpy as np

from hermes_core import PackedRows, Rows, Samples, WindowedPacker, build_rows, open_store

Sample = tuple[np.ndarray, np.ndarray]  # token ids, and whether each is in the loss


def rows_of(stream: Iterable[Sample], row_length: int, window: int = 1000) -> Iterator[Rows]:
    packer = WindowedPacker(row_length=row_length, window=window, too_long="truncate")
    waiting: dict[int, Sample] = {}

    def built(made: PackedRows) -> Iterator[Rows]:
        if made.rows:
            ids, masks = zip(*(waiting.pop(number) for number in made.samples), strict=True)
            samples = Samples.from_lists(ids, masks)
            yield from (build_rows(samples, made.in_order(), [row]) for row in range(made.rows))

    for number, sample in enumerate(stream):
        waiting[number] = sample
        yield from built(packer.add([len(sample[0])]))
    yield from built(packer.finish())


if __name__ == "__main__":
    samples = open_store(sys.argv[1])
    rows = list(rows_of((samples[i] for i in range(len(samples))), row_length=2048))
    kept = sum(len(row.kept) for row in rows)
    print(f"{len(samples)} samples in {len(rows)} rows, {kept} tokens in the loss")
