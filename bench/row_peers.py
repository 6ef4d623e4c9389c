"""What others do with the same samples: collators of padding-free batches, packing data sets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.harness import Result, by_turns, row_result
from bench.lengths import ROW_LENGTH
from hermes_core import IGNORE_INDEX, Packing, Samples

ROWS = 32  # of the plan; a collator takes some ten milliseconds for each
RUNS = 9
BINS = 64  # rows that Grain's first fit has open

Features = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to make batches; ``call`` alone is timed, over the samples of several batches.

    ``call`` gets what ``prepare`` made, and the rows of a batch; it gives the ids of each batch as
    an array, whose length is checked against the samples.
    """

    name: str
    module: str
    prepare: Callable[[list[Features]], Any]
    call: Callable[[Any, int], list[Any]]


def as_lists(batches: list[Features]) -> list[Features]:
    """As a data set of Hugging Face gives them by default."""
    return [[{name: array.tolist() for name, array in each.items()} for each in b] for b in batches]


def transformers(batches: list[Features], _: int) -> list[Any]:
    collator = importlib.import_module("transformers").DataCollatorWithFlattening(
        return_flash_attn_kwargs=True
    )
    return [collator(batch)["input_ids"] for batch in batches]


def trl(batches: list[Features], _: int) -> list[Any]:
    module = importlib.import_module("trl.trainer.sft_trainer")
    collator = module.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return [collator(batch)["input_ids"] for batch in batches]


def one_dataset(batches: list[Features]) -> Any:
    samples = [each for batch in batches for each in batch]
    return importlib.import_module("grain").MapDataset.source(samples).to_iter_dataset()


def grain_first_fit(dataset: Any, rows: int) -> list[Any]:
    packed = importlib.import_module("grain.experimental").FirstFitPackIterDataset(
        dataset,
        length_struct={"input_ids": ROW_LENGTH, "labels": ROW_LENGTH},
        num_packing_bins=BINS,
        shuffle_bins=False,
        meta_features=["labels"],  # one set of positions is enough
    )
    return [each["input_ids"][each["input_ids_segment_ids"] > 0] for each in packed.batch(rows)]


def grain_split(dataset: Any, rows: int) -> list[Any]:
    packed = importlib.import_module("grain.experimental").ConcatThenSplitIterDataset(
        dataset, length_struct={"input_ids": ROW_LENGTH, "labels": ROW_LENGTH}
    )
    return [each["input_ids"][each["input_ids_segment_ids"] > 0] for each in packed.batch(rows)]


PEERS = (
    Peer("transformers flattening, lists", "transformers", as_lists, transformers),
    Peer("transformers flattening, arrays", "transformers", list, transformers),
    Peer("trl padding-free, lists", "trl", as_lists, trl),
    Peer("trl padding-free, arrays", "trl", list, trl),
    Peer("grain first fit", "grain.experimental", one_dataset, grain_first_fit),
    Peer("grain concat then split", "grain.experimental", one_dataset, grain_split),
)


def against_peers(
    samples: Samples, packing: Packing, ours: dict[int, tuple[Callable[[], object], int]]
) -> Iterator[Result | str]:
    """Each peer that is installed, on the plan's first rows, by turns with ours on all of them.

    Theirs stay in the caches; ours, by rows at a time: a call for all batches, and their tokens.
    """
    for batch, (build, ours_tokens) in ours.items():
        yield f"\n{batch} at a time"
        starts = range(0, ROWS, batch)
        batches = [features(samples, packing, start, start + batch) for start in starts]
        tokens = sum(len(each["input_ids"]) for some in batches for each in some)
        for peer in PEERS:
            try:
                importlib.import_module(peer.module)
            except ImportError as error:
                yield f"{peer.name}: skipped, not importable ({error})"
                continue
            call = partial(peer.call, peer.prepare(batches), batch)
            check(peer.name, call(), tokens)
            mine, theirs = by_turns([build, call], runs=RUNS)
            times = theirs.times(mine) * ours_tokens / tokens
            rate = ours_tokens / mine.cpu_s / 1e6
            note = f"build_rows int64, {rate:,.0f} beside it, is {times:.0f} x"
            yield row_result(peer.name, batch, theirs, tokens, note)


def check(name: str, batches: list[Any], tokens: int) -> None:
    """Stop if these hold other tokens: no time for a wrong answer."""
    made = sum(ids.size if isinstance(ids, np.ndarray) else ids.numel() for ids in batches)
    if made != tokens:
        raise SystemExit(f"{name} gives {made} tokens of {tokens}: no time for it")


def features(samples: Samples, packing: Packing, first: int, end: int) -> Features:
    """The samples of these rows as ids and labels; made before anything is timed."""
    made = []
    for sample in packing.samples[packing.row_offsets[first] : packing.row_offsets[end]]:
        ids, mask = samples[int(sample)]
        wide = ids.astype(np.int64)
        made.append({"input_ids": wide, "labels": np.where(mask, wide, IGNORE_INDEX)})
    return made
