"""What the loss's kernels become on GPUs that are not here, and what its work must cost there.

Shapes: N positions, M kept, D model size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.harness import Result
from bench.machine_code import TARGETS, MachineCode, compile_kernel

# Most registers a thread, capped or not, on either version of Triton: at 8 warps, 64 leave room
# for 4 blocks on a multiprocessor, which hide one another's loads.
REGISTERS = {
    "loss_and_gradient_kernel": 64, "statistics_kernel": 80, "gradient_kernel": 48,
    "scale_kernel": 64, "held_kernel": 64,
}  # fmt: skip
LOAD, STORE = "LDG.E.128", "STG.E.128"
COPY = "LDGSTS.E.BYPASS.128"  # into shared memory
POINTERS = {
    "loss_and_gradient_kernel": ("columns", "weights", "lse_out", "target_out"),
    "statistics_kernel": ("columns", "lse_out", "target_out", "expected_out"),
    "gradient_kernel": ("columns", "lses", "scales", "tilts", "targets"),
    "held_kernel": ("columns", "weights", "lse_out", "target_out"),
}


@dataclass(frozen=True, slots=True)
class Chip:
    """Datasheet: bf16 products and fp32 products, FLOP/s, and memory, bytes/s."""

    name: str
    half: float
    single: float
    memory: float


POSITIONS, VOCABULARY, SIZE = 16_384, 128_256, 5_120
SMALL_VOCABULARY = 32_768  # two rows of which are held
CHIPS = (
    Chip("H100", 989e12, 67e12, 3.35e12),
    Chip("H200", 989e12, 67e12, 4.8e12),
    Chip("B200", 2250e12, 80e12, 8.0e12),
)
MATMUL_SHARE = 0.8  # of the datasheet's rate: 790 TFLOP/s was measured on an H200


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How a loss goes about it, in bf16: what each counts is in `predicted_ms`."""

    name: str
    compacts: bool
    products: int  # of 2 * rows * V * D FLOP
    logit_bytes: int  # moved for each logit
    chunk_rows: int | None  # None: ours, even ones
    sum_bytes: int  # of an element of the weight's gradient while it is added up
    single: bool = False  # products in fp32


# write, kernel reads and writes, two products read: 10 bytes; 12 where the kernel reads twice.
ALGORITHMS = (
    Algorithm("hermes_core", True, 3, 10, None, 4),
    Algorithm("Liger, chunk_mem_const 1", False, 3, 12, 1024, 2),
    Algorithm("Liger, chunk_mem_const 16", False, 3, 12, 8192, 2),
    Algorithm("torch chunked", False, 3, 14, 4096, 2),
    Algorithm("quack", False, 3, 10, 4096, 4),
    Algorithm("CCE, no filter", True, 4, 0, None, 2),
    Algorithm("TRL chunked_nll", True, 4, 28, 256, 4, single=True),
    Algorithm("eager", False, 3, 22, 1 << 30, 2),
)


def run() -> Iterator[Result | str]:
    """The gate on machine code, then the prediction; no GPU is touched."""
    for target in TARGETS:
        kinds = [(kernel, VOCABULARY) for kernel in POINTERS] + [("held_kernel", SMALL_VOCABULARY)]
        for (kernel, vocabulary), capped in itertools.product(kinds, (False, True)):
            code = compiled(kernel, target, vocabulary, capped=capped)
            wrong = faults(kernel, code)
            if wrong:
                raise SystemExit(f"{kernel} on sm_{target}, cap {capped}: {'; '.join(wrong)}")
            yield told(kernel, code, capped=capped)
        code = compiled_scale(target)
        if wrong := faults("scale_kernel", code):
            raise SystemExit(f"scale_kernel on sm_{target}: {'; '.join(wrong)}")
        yield told("scale_kernel", code, capped=False)
    yield "gate passed: every kernel fits, spills nothing and moves 128 bits at a time"
    yield f"\nPredicted, not measured; positions {POSITIONS:,}, V {VOCABULARY:,}, D {SIZE:,}, bf16"
    yield f"products at {MATMUL_SHARE:.0%} of the datasheet's rate, memory at all of it"
    for chip in CHIPS:
        for share in (0.3, 0.6, 1.0):
            yield from predictions(chip, share)


def compiled(kernel: str, target: int, vocabulary: int, *, capped: bool) -> MachineCode:
    from hermes_kernels import cross_entropy, cross_entropy_held

    kinds = {"columns": "*i64"}
    signature = {name: kinds.get(name, "*fp32") for name in POINTERS[kernel]}
    signature |= {"logits": "*bf16", "size": "i32", "stride": "i32"}
    if kernel in ("loss_and_gradient_kernel", "held_kernel"):
        signature["z_loss"] = "fp32"
    module: Any = cross_entropy
    constants: dict[str, float] = {"BLOCK": cross_entropy.BLOCK}
    warps = cross_entropy.WARPS
    if kernel == "held_kernel":
        module, constants = cross_entropy_held, {**cross_entropy_held.constants(vocabulary)}
        warps = int(constants["THREADS"]) // 32
    return compile_kernel(
        getattr(module, kernel), signature, constants | {"SOFTCAP": 30.0 if capped else 0.0},
        target, divisible=("size", "stride"), num_warps=warps,
    )  # fmt: skip


def compiled_scale(target: int) -> MachineCode:
    from hermes_kernels import cross_entropy

    return compile_kernel(
        cross_entropy.scale_kernel, {"values": "*bf16", "factor": "*fp32", "size": "i32"},
        {"BLOCK": cross_entropy.BLOCK}, target, divisible=("size",), num_warps=cross_entropy.WARPS,
    )  # fmt: skip


def faults(kernel: str, code: MachineCode) -> list[str]:
    """What is wrong with a kernel's machine code, in words."""
    wrong = code.faults()
    if code.registers > REGISTERS[kernel]:
        wrong.append(f"{code.registers} registers a thread, at most {REGISTERS[kernel]}")
    if code.count(LOAD) == 0 or (kernel == "held_kernel" and code.count(COPY) == 0):
        wrong.append("no 128-bit load of logits")
    if kernel != "statistics_kernel" and code.count(STORE) == 0:
        wrong.append("no 128-bit store of gradients")
    return wrong


def told(kernel: str, code: MachineCode, *, capped: bool) -> Result:
    loads = f"{code.count(LOAD, COPY)} of {code.count('LDG.', 'LDGSTS')} loads"
    notes = (
        f"{code.warps} warps, {code.shared_bytes} bytes shared, {code.count('LDL', 'STL')} spills, "
        f"{loads} and {code.count(STORE)} of {code.count('STG')} stores of 128 bits, "
        f"{code.count('MUFU.EX2')} exp2, {sum(code.opcodes().values())} instructions"
    )
    name = f"{kernel.removesuffix('_kernel')}{', cap' if capped else ''}, sm_{code.target}"
    registers = float(code.registers)
    return Result(
        "loss, static", "BLOCK columns of V", "bfloat16", name, "registers", registers,
        (registers, registers), 1, notes,
    )  # fmt: skip


def predictions(chip: Chip, share: float) -> Iterator[Result]:
    positions, vocabulary, size = POSITIONS, VOCABULARY, SIZE
    kept = round(positions * share)
    floor = 1e3 * 6 * kept * vocabulary * size / (MATMUL_SHARE * chip.half)
    mine = predicted_ms(ALGORITHMS[0], chip, positions, kept, vocabulary, size)
    for algorithm in ALGORITHMS:
        ms = predicted_ms(algorithm, chip, positions, kept, vocabulary, size)
        yield Result(
            "loss, predicted", f"V {vocabulary}, D {size}, {share:.0%} of {positions} kept",
            "bfloat16", f"{chip.name}, {share:.0%}: {algorithm.name}", "ms", ms, (ms, ms), 1,
            f"{ms / mine:.2f} x ours, {floor / ms:.2f} of the floor of the products",
        )  # fmt: skip


def predicted_ms(
    algorithm: Algorithm, chip: Chip, positions: int, kept: int, vocabulary: int, size: int
) -> float:
    """Time of the products plus that of the memory moved beside them, as if nothing overlapped."""
    rows = kept if algorithm.compacts else positions
    elements = vocabulary * size
    most = algorithm.chunk_rows or 2**30 // (2 * vocabulary)
    if algorithm.chunk_rows is None:  # as `Plan.use_room` has it
        row, room = vocabulary + 2 * size, most * vocabulary
        one = rows * row <= room + 2 * elements
        most = rows if one else max(most, (room + elements) // row)
    chunks = -(-rows // most)
    rate = chip.single if algorithm.single else MATMUL_SHARE * chip.half
    flop = 2 * algorithm.products * rows * elements
    # The first chunk writes the sum, later ones read and write it; it is rounded at the end.
    added = (algorithm.sum_bytes * (2 * chunks - 1) if chunks > 1 else 2) * elements
    rounded = (algorithm.sum_bytes + 2) * elements if algorithm.sum_bytes == 4 and chunks > 1 else 0
    weights = 2 * 2 * elements * chunks
    moved = algorithm.logit_bytes * rows * vocabulary + added + rounded + weights
    return 1e3 * (flop / rate + moved / chip.memory)
