"""What is read out of machine code: instructions counted, and what would stop a launch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.machine_code import TARGETS, MachineCode

SASS = """
\t\tFunction : add_one
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/             @!UP0 LDG.E R8, desc[UR4][R2.64] ;
        /*0030*/                   EXIT ;
"""
SMALL = MachineCode(
    target=90, ptx="", sass=SASS, ttgir="", registers=64, stack_bytes=0, shared_bytes=1024,
    tensor_memory_columns=0, warps=4,
)  # fmt: skip


def test_instructions_are_counted_by_prefix_whatever_their_predicate() -> None:
    assert SMALL.count("LDG") == 2
    assert SMALL.count("LDG.E.128") == 1
    assert sum(SMALL.opcodes().values()) == 4


def test_a_kernel_that_fits_has_no_faults() -> None:
    assert SMALL.faults() == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shared_bytes": 589_824}, "589824 bytes of shared memory"),
        ({"tensor_memory_columns": 704}, "704 columns of tensor memory"),
        ({"registers": 255, "warps": 12}, "255 registers x 384 threads"),
        ({"sass": SASS.replace("LDC R1", "STL R1")}, "1 spill instructions"),
    ],
)
def test_what_would_stop_a_launch_is_named(change: dict[str, object], fault: str) -> None:
    assert replace(SMALL, **change).faults() == [fault]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ptx", "early"),
    [
        ("st.shared.b32 [a], b;\nbar.sync 2, 128;\n@p mbarrier.arrive.shared::cta.b64 _, [c];", 0),
        ("bar.sync 2, 128;\nst.shared.b32 [a], b;\n@p mbarrier.arrive.shared::cta.b64 _, [c];", 1),
        ("tcgen05.st.sync.aligned [a];\nmbarrier.arrive.shared::cta.b64 _, [c];", 1),
        ("st.shared.b32 [a], b;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [c], 64;", 0),
    ],
)
def test_an_arrival_wants_the_warps_to_have_met(ptx: str, early: int) -> None:
    assert replace(SMALL, ptx=ptx).early_arrivals() == early


def test_a_kernel_is_compiled_for_gpus_that_are_not_here(repository: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=120)


def check_wide_loads() -> None:
    """Loads are 128 bits wide where the length is known to be a multiple of 16, and only there."""
    import triton
    import triton.language as tl

    from bench.machine_code import compile_kernel

    @triton.jit  # type: ignore[untyped-decorator]
    def add_one(x, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(x + at, mask=at < size) + 1.0, mask=at < size)

    for target in TARGETS:
        signature, constants = {"x": "*fp32", "size": "i32"}, {"BLOCK": 1024}
        wide = compile_kernel(add_one, signature, constants, target, divisible=["size"])
        narrow = compile_kernel(add_one, signature, constants, target)
        assert wide.count("LDG.E.128") > 0
        assert narrow.count("LDG.E.128") == 0 < narrow.count("LDG")
        assert wide.faults() == []
        assert f".target sm_{target}" in wide.ptx


if __name__ == "__main__":
    check_wide_loads()
