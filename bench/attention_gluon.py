"""The attention kernels in Gluon: compiled for sm_100, and a rate predicted for their backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from triton.experimental.gluon import language as gl

from bench.attention import Shape
from bench.attention_model import (
    BACKWARD_CALIBRATION,
    CHIPS,
    Turn,
    backward_tflops,
    fit,
    our_backward_tflops,
)
from bench.machine_code import MachineCode, compile_kernel
from hermes_kernels import forward_sm100, halves_sm100
from hermes_kernels.dkdv_sm100 import dkdv_kernel
from hermes_kernels.dq_sm100 import dq_kernel
from hermes_kernels.launch import TILE, Kernel, Launch, parts_of

TYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}
KERNELS = {"pairs": forward_sm100.pair_kernel, "dq_sm100": dq_kernel, "dkdv_sm100": dkdv_kernel}


def compile_gluon(
    kernel: Kernel,
    size: int,
    launch: Launch,
    *,
    kv_heads: int = 8,
    group: int = 8,
    dtype: str = "bf16",
) -> MachineCode:
    """One of `KERNELS`, for so many query heads to each key head."""
    function, home = KERNELS[kernel], forward_sm100 if kernel == "pairs" else halves_sm100
    constants = {"G": group, "S": parts_of(kv_heads, group), "STAGES": launch.stages}
    kinds = {"scale": "fp32", "T": "i32", "U": "i32", "order": "*i32", "starts": "*i32"}
    kinds |= {"ends": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    vector = _boxes("fp32", [TILE])
    kinds |= {"lse_desc": vector, "delta_desc": vector}
    block = _boxes(dtype, [TILE, size])
    names = function.arg_names
    return compile_kernel(
        function,
        {name: kinds.get(name, block) for name in names if name not in constants},
        {name: value for name, value in constants.items() if name in names},
        100,
        divisible=("T", "U"),
        num_warps=home.WARPS,
        maxnreg=home.REGISTERS,
    )


def _boxes(dtype: str, block: list[int]) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[dtype])
    return f"tensordesc<{dtype}{block},{layout!r}>"


def border_share(shape: Shape, turn: Turn) -> float:
    """Share of the turns over key tiles that are at a border, where `dkdv_sm100` masks."""
    lengths = np.array(shape.lengths)
    ends = np.repeat(np.cumsum(lengths), lengths)
    tiles = np.arange(0, shape.tokens, turn.keys)
    last = ends[np.minimum(tiles + turn.keys, shape.tokens) - 1]
    blocks = np.ceil((last - tiles) / turn.queries)
    inner = np.maximum((ends[tiles] - tiles) // turn.queries, 1) - 1
    return float(1 - inner.sum() / blocks.sum())


def predict_gluon(
    turns: Mapping[tuple[int, str, int], Turn], shapes: Sequence[Shape]
) -> Iterator[str]:
    """Predictions for the backward at each shape, beside the one in Triton."""
    chip = next(c for c in CHIPS if c.target == 100)
    back = next(k for k in BACKWARD_CALIBRATION if k.target == 100)
    like = shapes[0]
    dense = Shape("dense", (8192,), like.heads, like.size, like.dtype)
    overlap = fit(chip, back, dense, backward_tflops)
    dq, dkdv = (turns[100, f"{name}_sm100", 128] for name in ("dq", "dkdv"))
    yield f"\n{chip.name}, PREDICTED, not measured: gluon's backward, beside triton's"
    for name, turn in (("dq", dq), ("dkdv", dkdv)):
        yield (
            f"{name}: {turn.flops / chip.flops:,.0f} cycles of tensor cores, "
            f"{turn.special:,.0f} of exponentials, {turn.issue:,.0f} of issue slots"
        )
    for shape in shapes:
        masking = round(border_share(shape, dkdv) * dkdv.masking)
        ours = replace(dkdv, instructions=dkdv.instructions + masking)
        rate = our_backward_tflops(dq, ours, chip, overlap, shape)
        plain = (turns[100, name, 128] for name in ("dq", "dkdv"))
        other = our_backward_tflops(*plain, chip, overlap, shape)
        best = backward_tflops(back.turn, chip, overlap, shape)
        yield (
            f"{shape!s:58} backward {rate:5,.0f}, {rate / best:.2f} of FlashAttention's "
            f"({best:,.0f}), {rate / other:.2f} of triton's ({other:,.0f})"
        )
