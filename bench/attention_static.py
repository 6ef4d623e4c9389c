"""The attention kernels as machine code, for every entry of their table: what can be proven here.

That each compiles, fits and multiplies on the tensor cores by the widest instruction, loads by TMA,
has warps with roles of their own where it is in Gluon, spills nothing and keeps its budget. A rate
is predicted from the same loops, and is a prediction: no kernel has run on a B200.

Triton must not interpret in this process. For another Triton, put it first on PYTHONPATH.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from bench.attention import gpu_shapes
from bench.attention_gluon import HOPPER, compile_gluon, predict_gluon, waits
from bench.attention_gluon import KERNELS as GLUON
from bench.attention_model import Turn, makespan, predict, staying
from bench.attention_triton import predict_triton, with_overlaps
from bench.harness import Result
from bench.machine_code import HOT, MachineCode, compile_kernel
from hermes_kernels import varlen_attention as kernels
from hermes_kernels.launch import TABLE, Kernel, Launch, launch_of, parts_of

TARGETS = (90, 100)
MATRIX = {90: "HGMMA", 100: "UTCHMMA"}

# Instructions that a warp issues in one turn of the softmax loop, by class, with Triton 3.7.1 or
# 3.6.0, whichever is more. A regression is more than a twentieth and four above that. In Gluon also
# "masking", those more at a border, and "roles", those of all warps without exponentials.
BUDGET_FILE = Path(__file__).with_name("attention_budget.json")
CLASSES = {
    "matrix": ("HGMMA", "UTCHMMA", "HMMA"),
    "special": ("MUFU",),
    "float": ("FFMA", "FADD", "FMUL", "FMNMX", "FSEL", "FSETP", "F2FP"),
    "integer": (
        "IADD", "IMAD", "LOP3", "ISETP", "SEL", "SHF", "LEA", "VIADD", "PLOP", "R2P", "PRMT", "MOV",
    ),
    "memory": ("LD", "ST", "UTMA", "SYNCS", "UBLK"),
}  # fmt: skip


def budget() -> dict[str, dict[str, int]]:
    """The budget of each entry, by class."""
    known: dict[str, dict[str, int]] = json.loads(BUDGET_FILE.read_text())
    return known


@dataclass(frozen=True)
class Entry:
    """One line of the table and what the compiler makes of it."""

    target: int
    kernel: Kernel
    size: int
    launch: Launch
    code: MachineCode

    @property
    def loop(self) -> Counter[str]:
        """The loop that does the softmax: the shortest that has most of the exponentials."""
        return min(self._softmax_loops, key=Counter.total, default=Counter())

    @property
    def _softmax_loops(self) -> list[Counter[str]]:
        loops = self.code.hot_loops()
        most = max((body["MUFU.EX2"] for body in loops), default=0)
        return [body for body in loops if 2 * body["MUFU.EX2"] >= most]

    def count(self, *prefixes: str) -> int:
        """Instructions of that loop by the beginning of their names."""
        return sum(n for name, n in self.loop.items() if name.startswith(prefixes))

    @property
    def name(self) -> str:
        return f"sm_{self.target} {self.kernel} {self.size}"

    @property
    def masking(self) -> int:
        """Instructions more of the loop that masks, where it is one of its own."""
        if not self._in_gluon:
            return 0
        return max(map(Counter.total, self._softmax_loops), default=0) - self.loop.total()

    @property
    def reckonings(self) -> set[tuple[tuple[str, int], ...]]:
        """What turns reckon by, masked or not: in two ways, bits would follow from where a segment
        stands, as does which of its turns are masked."""
        names = ("FADD", "FMUL", "FFMA", "MUFU")
        return {
            tuple(sorted((name, n) for name, n in body.items() if name.startswith(names)))
            for body in self._softmax_loops
        }

    @property
    def others(self) -> int:
        """Instructions that all roles but the softmax issue in a turn."""
        if not self._in_gluon:
            return 0
        return sum(
            body.total() * (self.launch.warps if body["FMUL"] + body["FMUL2"] else 1)
            for body in self.role_loops
            if body not in self._softmax_loops
        )

    @property
    def role_loops(self) -> list[Counter[str]]:
        """Of every role; what stores the output is no loop, though its waits jump back."""
        loops = self.code.loops(*HOT, "LDTM", "UTMALDG")
        return [body for body in loops if not any(name.startswith("UTMASTG") for name in body)]

    def classes(self) -> dict[str, int]:
        """Instructions of that loop by class; "other" are what no class names."""
        counts = {name: self.count(*prefixes) for name, prefixes in CLASSES.items()}
        counts["other"] = self.loop.total() - sum(counts.values())
        return counts | ({"masking": self.masking, "roles": self.others} if self._in_gluon else {})

    @property
    def _in_gluon(self) -> bool:
        return self.kernel in GLUON

    def overspent(self) -> list[str]:
        """Classes that are over their budget."""
        allowed = budget()[self.name]
        return [
            f"{count} {name} instructions a turn, budget {allowed[name]}"
            for name, count in self.classes().items()
            if count > 1.05 * allowed[name] + 4
        ]

    def faults(self) -> list[str]:
        """What is wrong; empty where nothing is."""
        code, matrix, early = self.code, MATRIX[self.target], self.code.early_arrivals()
        pauses = max((body["WARPGROUP.DEPBAR.LE"] for body in code.hot_loops()), default=0)
        checks = {
            f"no {matrix}": code.count(matrix) == 0,
            "no TMA loads": code.count("UTMALDG") == 0,
            "warps are not specialised": self._in_gluon and code.warps <= self.launch.warps,
            "no loop that exponentiates": not self.loop,
            f"{pauses} waits for products a turn": (
                self.kernel in HOPPER and pauses > waits(self.kernel)
            ),
            "masked turns reckon otherwise": self._in_gluon and len(self.reckonings) > 1,
            f"{early} arrivals before all warps have met": self._in_gluon and early > 0,
        }
        wrong = [text for text, so in checks.items() if so]
        return code.faults() + wrong + self.overspent()


def entries() -> Iterator[Entry]:
    """Every entry of the table for the two targets, compiled."""
    for (target, kernel, size), launch in TABLE.items():
        if target in TARGETS:
            yield Entry(target, kernel, size, launch, compile_entry(target, kernel, size, launch))


def compile_entry(
    target: int, kernel: Kernel, size: int, launch: Launch, *, kv_heads: int = 8
) -> MachineCode:
    """One kernel as the recipes call it: bf16, 64 query heads on 8, or a rank's share of them."""
    if kernel in GLUON:
        return compile_gluon(kernel, size, launch, kv_heads=kv_heads)
    queries = f"tensordesc<bf16[{launch.queries},{size}]>"
    keys = f"tensordesc<bf16[{launch.keys},{size}]>"
    vector = f"tensordesc<fp32[{launch.queries}]>"
    function: Any = getattr(kernels, f"{kernel}_kernel")
    constants = {
        "G": 8, "S": parts_of(kv_heads, 8), "H": size, "M": launch.queries, "J": launch.keys,
    }  # fmt: skip
    kinds = {"scale": "fp32", "T": "i32", "U": "i32", "lse_ptr": "*fp32"}
    kinds |= dict.fromkeys(("order", "starts", "ends", "block_of", "blocks"), "*i32")
    kinds |= dict.fromkeys(("exponents_ptr", "deltas_ptr"), "*fp32")
    kinds |= dict.fromkeys(("exponents_desc", "deltas_desc"), vector)
    kinds |= dict.fromkeys(("q_desc", "dout_desc", "out_desc", "dq_desc"), queries)
    kinds |= dict.fromkeys(("k_desc", "v_desc", "dk_desc", "dv_desc"), keys)
    return compile_kernel(
        function,
        {name: kinds[name] for name in function.arg_names if name in kinds},
        {name: value for name, value in constants.items() if name in function.arg_names},
        target,
        divisible=("T", "U"),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def gluon_faults() -> list[str]:
    """What is wrong in Gluon where a group is odd and its one key head in parts, and in fp16."""
    wrong = []
    for (target, kernel, size), launch in TABLE.items():
        for kv_heads, group, dtype in ((1, 5, "bf16"), (8, 8, "fp16")) if kernel in GLUON else ():
            code = compile_gluon(kernel, size, launch, kv_heads=kv_heads, group=group, dtype=dtype)
            faults = Entry(target, kernel, size, launch, code).faults()
            wrong += [f"{kernel} {size}, {group} heads, {dtype}: {fault}" for fault in faults]
    return wrong


def statistics_faults() -> list[str]:
    """What is wrong with the one kernel that multiplies no matrices, and is in no table."""
    given = dict.fromkeys(("out_ptr", "dout_ptr"), "*bf16")
    pointers = given | dict.fromkeys(("lse_ptr", "exponents_ptr", "deltas_ptr"), "*fp32")
    wrong = []
    for target, size in sorted({(target, size) for target, _, size in TABLE if target in TARGETS}):
        how = launch_of(target, "statistics", size)
        code = compile_kernel(
            kernels.statistics_kernel,
            pointers | {"T": "i32", "U": "i32"},
            {"N": 64, "H": size, "M": how.queries},
            target,
            divisible=("T", "U"),
            num_warps=how.warps,
        )
        faults = code.faults() + ([] if code.count("LDG.E.128") else ["no 128-bit loads"])
        wrong += [f"sm_{target} statistics {size}: {fault}" for fault in faults]
    return wrong


def part_faults() -> list[str]:
    """What is wrong with dkdv where it cuts the query heads of its one key head into parts."""
    wrong = []
    for (target, kernel, size), launch in TABLE.items():
        if target in TARGETS and kernel == "dkdv":
            code = compile_entry(target, kernel, size, launch, kv_heads=1)
            faults = Entry(target, kernel, size, launch, code).faults()
            wrong += [f"sm_{target} dkdv {size} in parts: {fault}" for fault in faults]
    return wrong


def run() -> Iterator[Result | str]:
    """A line for each entry, then the predictions; an entry with a fault ends the run."""
    yield f"Triton {triton.__version__}; compiled, not run: no figure here was measured\n"
    wrong, turns = [], {}
    for entry in entries():
        faults = entry.faults()
        wrong += [f"{entry.name}: {fault}" for fault in faults]
        yield line(entry) + (f"  FAULT: {'; '.join(faults)}" if faults else "")
        turns[entry.target, entry.kernel, entry.size] = turn_of(entry)
    wrong += statistics_faults() + part_faults() + gluon_faults()
    if wrong:
        raise SystemExit("\n".join(wrong))
    yield "gate passed: every entry fits, multiplies by HGMMA or UTCHMMA and spills nothing"
    turns = with_overlaps(turns)
    yield from predict(turns, gpu_shapes())
    yield from predict_triton(turns, gpu_shapes())
    yield from predict_gluon(turns, gpu_shapes())


def line(entry: Entry) -> str:
    how, code = entry.launch, entry.code
    by_class = ", ".join(f"{count} {name}" for name, count in entry.classes().items() if count)
    roles = " by role" if entry.kernel in GLUON else ""
    special = f"{code.warps} warps{roles}"
    return (
        f"sm_{entry.target:<3} {entry.kernel:10} {entry.size:3}  {how.queries:3} x {how.keys:<3} "
        f"{special:16} {code.registers:3} registers  {code.shared_bytes:7,} B shared  "
        f"{code.tensor_memory_columns:3} tensor columns  "
        f"{code.count(MATRIX[entry.target]):3} {MATRIX[entry.target]}, "
        f"{entry.loop.total():3} instructions a turn ({by_class}), "
        f"{code.count('LDL', 'STL')} spills"
    )


def turn_of(entry: Entry) -> Turn:
    """One turn of the softmax loop, as `attention_model` wants it."""
    how, heads = entry.launch, 2 if entry.kernel == "pairs" else 1
    twice = entry.kernel in GLUON  # there the warps asked for stand twice, as two groups
    products = {"forward": 2, "pairs": 2, "dq": 3, "dkdv": 4}[entry.kernel.split("_")[0]]
    return Turn(
        queries=how.queries,
        keys=how.keys,
        flops=2 * products * heads * how.queries * how.keys * entry.size,
        instructions=entry.loop.total(),
        warps=how.warps * (2 if twice else 1),
        others=entry.others,
        exponentials=entry.count("MUFU.EX2"),
        masking=entry.masking,
        heads=heads,
        span=staying if entry.kernel in HOPPER else makespan,
    )
