"""`hermes4 pack`: plan the rows of the first epoch and say how well they are filled."""

from __future__ import annotations

import sys
from pathlib import Path

from hermes_core import Store, StoreError, open_store
from hermes_core.packing import counted
from hermes_pipeline.errors import UserError
from hermes_pipeline.packing import check_choices, imbalance_report, length_histogram, plan_epoch
from hermes_pipeline.services.folders import writing
from hermes_pipeline.training.lost import lost_to_rows
from hermes_pipeline.training.shape import BASES


def run(
    store: Path,
    *,
    row_length: int = 16_384,
    strategy: str = "best",
    too_long: str = "error",
    seed: int = 0,
    out: Path | None = None,
    ranks: int | None = None,
    micro_batches: int | None = None,
    base: str = "qwen3_14b",
) -> None:
    """Print rows, fill, lower bound and histogram; write the plan to ``out`` (.npz).

    With ``ranks``, print what these lose by waiting for each other, by the FLOPs of ``base``.

    Raises:
        UserError: no store, a damaged one, or one that cannot be packed so.
    """
    if seed < 0:
        raise UserError(f"--seed is {seed}, want 0 or more")
    if out is not None and out.suffix != ".npz":
        raise UserError(f"--out {out} must end in .npz")
    if ranks is None and micro_batches is not None:
        raise UserError(f"--micro-batches {micro_batches} is for --ranks; give that, too")
    check_choices(strategy, too_long)
    if base not in BASES:
        raise UserError(f"--base {base!r} is not known; known: {', '.join(BASES)}")
    try:
        opened = open_store(store)
        lengths = opened.lengths
    except (StoreError, OSError) as error:
        raise UserError(str(error)) from None
    if len(opened):
        _describe(store, opened, row_length)
    plan = plan_epoch(
        opened, row_length=row_length, strategy=strategy, too_long=too_long, seed=seed
    )
    _say(plan.report())
    lost = lost_to_rows(opened, row_length=row_length, too_long=plan.too_long)
    if lost.samples:
        _say(
            f"{lost.tokens:,} of {opened.token_count:,} tokens are lost with them, "
            f"{lost.kept:,} of {opened.kept_count:,} kept ones"
        )
    if ranks is not None:
        flops = BASES[base].training_flops()
        given = micro_batches or 1
        _say(imbalance_report(plan, lengths, flops, ranks=ranks, micro_batches=given))
    if out is not None:
        with writing(out, goes_on="run the same command again"):
            out.parent.mkdir(parents=True, exist_ok=True)
            plan.save(out)
        _say(f"plan written to {out}")


def _describe(folder: Path, store: Store, row_length: int) -> None:
    lengths = store.lengths
    _say(f"{folder}: {counted(len(store), 'sample')}, {counted(store.token_count, 'token')}")
    for line in length_histogram(lengths, row_length):
        _say(line)
    longer = int((lengths > row_length).sum())
    verb = "is" if longer == 1 else "are"
    _say(f"{counted(longer, 'sample')} {verb} longer than a row of {row_length:,}")


def _say(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(line.encode(encoding, "replace").decode(encoding) + "\n")
