"""Compile a Triton kernel for a GPU that is not here, and read its machine code.

Everything needed lies in Triton's wheel: ptxas, cuobjdump, nvdisasm. Triton decides at import
whether it interprets, so this needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

# What a block may have on sm_90 and sm_100; the compiler accepts more, the launch does not.
SHARED_BYTES = 232_448
TENSOR_MEMORY_COLUMNS = 512
REGISTERS = 65_536
TARGETS = (90, 100)

OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", re.MULTILINE)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)(.*)$", re.MULTILINE)
JUMP = re.compile(r"\b(0x[0-9a-f]+)")
# What of PTX matters before an arrival: did the warps of a role meet after they touched memory?
ARRIVAL = re.compile(
    r"(mbarrier\.arrive(?!\.expect)|bar\.sync|tcgen05\.(?:ld|st)|(?:ld|st)\.shared|(?:ld|st)matrix)"
)
HOT = ("HGMMA", "UTCHMMA", "HMMA", "MUFU.EX2")


def _count(opcodes: Counter[str], *prefixes: str) -> int:
    return sum(n for name, n in opcodes.items() if name.startswith(prefixes))


@dataclass(frozen=True, slots=True)
class MachineCode:
    """A kernel as one target runs it; ``warps`` counts those that specialisation added too."""

    target: int
    ptx: str = field(repr=False)
    sass: str = field(repr=False)
    ttgir: str = field(repr=False)
    registers: int  # of one thread
    stack_bytes: int  # of one thread; spilled registers lie here
    shared_bytes: int
    tensor_memory_columns: int
    warps: int

    def opcodes(self) -> Counter[str]:
        """Each machine instruction, with its modifiers, and how often it stands there."""
        return Counter(OPCODE.findall(self.sass))

    def count(self, *prefixes: str) -> int:
        """Instructions whose name starts with one of ``prefixes``: "HGMMA", "LDG.E.128"."""
        return _count(self.opcodes(), *prefixes)

    def hot_loops(self) -> list[Counter[str]]:
        """The instructions of each innermost loop that multiplies matrices or exponentiates."""
        return self.loops(*HOT)

    def loops(self, *names: str) -> list[Counter[str]]:
        """The instructions of each innermost loop that has one whose name starts so.

        Waits for a barrier that try again stand at the end and jump back into the middle: these are
        no loops, nor is one that re-divides registers, or one around another such as tiles are
        taken in.
        """
        code = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(self.sass)]
        spans = []
        for i, (at, name, rest) in enumerate(code):
            target = JUMP.search(rest) if name.startswith("BRA") else None
            again = any(name.startswith("SYNCS.PHASECHK") for _, name, _ in code[max(i - 2, 0) : i])
            if target and not again and (start := int(target[1], 16)) < at:
                spans.append((start, at))
        dividing = [at for at, name, _ in code if name.startswith("USETMAXREG")]
        spans = [s for s in spans if not any(s[0] <= at <= s[1] for at in dividing)]
        innermost = set[tuple[int, int]]()
        for at, name, _ in code:
            around = [s for s in spans if s[0] <= at <= s[1]]
            if name.startswith(names) and around:
                innermost.add(min(around, key=lambda s: s[1] - s[0]))
        outer = {
            (start, end)
            for start, end in innermost
            if any(start <= s and e <= end for s, e in innermost - {(start, end)})
        }
        return [
            Counter(name for at, name, _ in code if start <= at <= end)
            for start, end in sorted(innermost - outer)
        ]

    def early_arrivals(self) -> int:
        """Arrivals at a barrier, which one thread makes for its role, that other warps of the role
        may not yet have come to: a kernel's source does not say how they meet.
        """
        events = ["bar.sync", *ARRIVAL.findall(self.ptx)]
        return sum(
            now == "mbarrier.arrive" and before != "bar.sync" for before, now in pairwise(events)
        )

    def faults(self) -> list[str]:
        """What would stop a launch or spill; empty where nothing does."""
        threads = 32 * self.warps
        checks = {
            f"{self.shared_bytes} bytes of shared memory": self.shared_bytes > SHARED_BYTES,
            f"{self.tensor_memory_columns} columns of tensor memory": (
                self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS
            ),
            f"{self.registers} registers x {threads} threads": self.registers * threads > REGISTERS,
            f"{self.count('LDL', 'STL')} spill instructions": self.count("LDL", "STL") > 0,
        }
        return [text for text, wrong in checks.items() if wrong]


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: int,
    *,
    divisible: Sequence[str] = (),
    **options: Any,
) -> MachineCode:
    """Compile a kernel of Triton or Gluon for sm_``target``; takes seconds, needs no GPU.

    Args:
        signature: the type of each argument that is no constant, in Triton's words: "*bf16",
            "i32", "fp32", "tensordesc<bf16[128, 64]>".
        constants: the value of each `tl.constexpr` argument.
        divisible: integer arguments known to be multiples of 16. Pointers are taken to be, as
            torch's are; without it no wide load is made.
        options: num_warps, num_stages, ...

    Raises:
        RuntimeError: Triton interprets in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set here; compile in a process without it")
    at = {name: i for i, name in enumerate(kernel.arg_names)}
    aligned = [*(n for n, kind in signature.items() if kind.startswith("*")), *divisible]
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(at[name],): value for name, value in constants.items()},
        attrs={(at[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage, sass = _disassemble(built.asm["cubin"])
    resources = RESOURCES.search(usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump told no resources of {kernel.fn.__name__}: {usage!r}")
    registers, stack_bytes, _, _ = map(int, resources.groups())
    metadata = built.metadata
    return MachineCode(
        target=target,
        ptx=built.asm["ptx"],
        sass=sass,
        ttgir=built.asm["ttgir"],
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0,
        warps=metadata.num_warps,
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The resources of a binary and its machine code, as text."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run(
                [tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        ]
    return texts[0], texts[1]
