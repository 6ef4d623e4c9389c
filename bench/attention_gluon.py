"""The attention kernels in Gluon: compiled for sm_90 and sm_100, and a rate predicted for their
backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from triton.experimental.gluon import language as gl

from bench.attention import Shape
from bench.attention_model import (
    BACKWARD_CALIBRATION,
    CHIPS,
    Chip,
    Turn,
    backward_tflops,
    fit,
    our_backward_tflops,
    walk_on,
)
from bench.machine_code import MachineCode, compile_kernel
from hermes_kernels import (
    dkdv_sm90,
    dq_sm90,
    forward_sm90,
    forward_sm100,
    groups_sm90,
    halves_sm100,
)
from hermes_kernels.dkdv_sm100 import dkdv_kernel
from hermes_kernels.dq_sm100 import dq_kernel
from hermes_kernels.launch import TILE, Kernel, Launch, parts_of

TYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}
HOPPER = {"forward_sm90": forward_sm90, "dq_sm90": dq_sm90, "dkdv_sm90": dkdv_sm90}
KERNELS = {
    "pairs": forward_sm100.pair_kernel, "dq_sm100": dq_kernel, "dkdv_sm100": dkdv_kernel,
    "forward_sm90": forward_sm90.forward_kernel, "dq_sm90": dq_sm90.dq_kernel,
    "dkdv_sm90": dkdv_sm90.dkdv_kernel,
}  # fmt: skip


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
    function, hopper = KERNELS[kernel], kernel in HOPPER
    home = groups_sm90 if hopper else forward_sm100 if kernel == "pairs" else halves_sm100
    rows = groups_sm90.ROWS if hopper else TILE
    constants = {"G": group, "S": parts_of(kv_heads, group), "STAGES": launch.stages}
    kinds = {"scale": "fp32", "T": "i32", "U": "i32", "N": "i32", "stay": "i32", "lse_ptr": "*fp32"}
    kinds |= dict.fromkeys(("order", "starts", "ends", "block_of", "blocks"), "*i32")
    kinds |= dict.fromkeys(("exponents_ptr", "deltas_ptr"), "*fp32")
    vector, block = _boxes("fp32", [rows]), _boxes(dtype, [rows, size])
    kinds |= dict.fromkeys(("exponents_desc", "deltas_desc"), vector)
    if kernel == "forward_sm90":
        kinds |= dict.fromkeys(("k_desc", "v_desc"), _boxes(dtype, [launch.keys, size]))
    names = function.arg_names
    return compile_kernel(
        function,
        {name: kinds.get(name, block) for name in names if name not in constants},
        {name: value for name, value in constants.items() if name in names},
        90 if hopper else 100,
        divisible=("T", "U"),
        num_warps=home.WARPS,
        maxnreg=home.REGISTERS,
    )


def waits(kernel: Kernel) -> int:
    """How often a turn of a kernel of `HOPPER` waits for products, by its source.

    The compiler adds waits around each product where it cannot let it go on by itself.
    """
    return inspect.getsource(HOPPER[kernel]._step.fn).count("warpgroup_mma_wait(")


def _boxes(dtype: str, block: list[int]) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[dtype])
    return f"tensordesc<{dtype}{block},{layout!r}>"


def border_share(shape: Shape, turn: Turn) -> float:
    """Share of the turns over key tiles that are at a border, where Gluon's dkdv masks."""
    parts, masked = walk_on(shape, turn.keys, turn.queries)
    return float(masked.sum() / parts.sum())


def predict_gluon(
    turns: Mapping[tuple[int, str, int], Turn], shapes: Sequence[Shape]
) -> Iterator[str]:
    """Predictions for the backward at each shape, beside the one in Triton."""
    for chip in CHIPS:
        yield from _predict_for(chip, turns, shapes)


def _predict_for(
    chip: Chip, turns: Mapping[tuple[int, str, int], Turn], shapes: Sequence[Shape]
) -> Iterator[str]:
    target, like = chip.target, shapes[0]
    back = next(k for k in BACKWARD_CALIBRATION if k.target == target)
    dense = Shape("dense", (8192,), like.heads, like.size, like.dtype)
    overlap = fit(chip, back, dense, backward_tflops)
    dq, dkdv = (turns[target, f"{name}_sm{target}", 128] for name in ("dq", "dkdv"))
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
        plain = (turns[target, name, 128] for name in ("dq", "dkdv"))
        other = our_backward_tflops(*plain, chip, overlap, shape)
        best = backward_tflops(back.turn, chip, overlap, shape)
        yield (
            f"{shape!s:58} backward {rate:5,.0f}, {rate / best:.2f} of FlashAttention's "
            f"({best:,.0f}), {rate / other:.2f} of triton's ({other:,.0f})"
        )
