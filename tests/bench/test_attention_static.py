"""The gate on the attention kernels' machine code, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.attention_gluon import KERNELS as GLUON
from bench.attention_static import CLASSES, TARGETS, Entry, budget, turn_of
from bench.machine_code import MachineCode
from hermes_kernels.launch import TABLE

PAIRS = """
        /*0000*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4] ;
        /*0010*/                   BRA 0x0 ;
        /*0020*/                   LDTM.x32 R4, tmem[UR6] ;
        /*0030*/                   FMUL2 R4, R4.F32x2.HI_LO, R8.F32x2.HI_LO ;
        /*0040*/                   BRA 0x20 ;
        /*0050*/                   MUFU.EX2 R8, R2 ;
        /*0060*/                   BRA 0x50 ;
        /*0070*/                   FSEL R2, R2, R3, P0 ;
        /*0080*/                   MUFU.EX2 R8, R2 ;
        /*0090*/                   BRA 0x70 ;
        /*00a0*/                   LDTM.x32 R4, tmem[UR6] ;
        /*00b0*/                   UTMASTG.2D [UR8], [UR12] ;
        /*00c0*/                   BRA 0xa0 ;
"""
LOOP = """
        /*0000*/                   UTMALDG.2D [UR12], [UR8] ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ;
        /*0020*/                   MUFU.EX2 R8, R2 ;
        /*0030*/              @!P1 BRA 0x60 ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/                   EXIT ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3] ;
        /*0070*/                   BRA 0x20 ;
"""
TILES = """
        /*0000*/                   MUFU.EX2 R8, R2 ;
        /*0010*/                   MUFU.EX2 R8, R2 ;
        /*0020*/                   FADD R1, R1, R1 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3] ;
        /*0050*/              @!P1 BRA 0x90 ;
        /*0060*/                   MUFU.EX2 R8, R2 ;
        /*0070*/               @P0 BRA 0x0 ;
        /*0080*/                   EXIT ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3] ;
        /*00a0*/              @!P1 BRA 0x90 ;
        /*00b0*/                   BRA 0x60 ;
"""
CODE = MachineCode(
    target=90, ptx="", sass=LOOP, ttgir="", registers=168, stack_bytes=0, shared_bytes=1024,
    tensor_memory_columns=0, warps=12,
)  # fmt: skip
ENTRY = Entry(90, "forward", 128, TABLE[90, "forward", 128], CODE)


@pytest.mark.timeout(1100)
def test_every_entry_of_the_table_passes(repository: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [repository, repository / "kernels", os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, "-m", "bench", "attention", "--static"]
    told = subprocess.run(
        command, env=environment, cwd=repository, capture_output=True, text=True, timeout=1000
    )
    assert told.returncode == 0, told.stderr
    assert "gate passed" in told.stdout
    for target, kernel, size in TABLE:
        assert target not in TARGETS or f"sm_{target:<3} {kernel:10} {size:3}" in told.stdout


def test_each_entry_has_a_budget() -> None:
    known = budget()
    assert set(known) == {f"sm_{t} {kernel} {h}" for t, kernel, h in TABLE if t in TARGETS}
    for name, spent in known.items():
        more = {"masking", "roles"} if name.split()[1] in GLUON else set()
        assert set(spent) == {*CLASSES, "other", *more}


def test_waits_that_jump_back_are_no_loops() -> None:
    (loop,) = CODE.hot_loops()
    assert loop.total() == 4
    assert loop["MUFU.EX2"] == 1


def test_loops_around_loops_and_waits_from_one_into_another_are_none() -> None:
    (loop,) = replace(CODE, sass=TILES).hot_loops()
    assert loop == {"MUFU.EX2": 1, "FADD": 1, "BRA": 1}


def test_code_that_fits_has_no_faults() -> None:
    assert ENTRY.faults() == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shared_bytes": 240_000}, "240000 bytes of shared memory"),
        ({"registers": 255}, "255 registers x 384 threads"),
        ({"sass": LOOP.replace("HGMMA", "HMMA")}, "no HGMMA"),
        ({"sass": LOOP.replace("UTMALDG.2D", "LDG")}, "no TMA loads"),
        ({"sass": LOOP.replace("MUFU.EX2 R8, R2", "STL [R1], R8")}, "1 spill instructions"),
        ({"sass": LOOP.replace("EXIT", "LDL")}, "1 spill instructions"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], fault: str) -> None:
    entry = replace(ENTRY, code=replace(CODE, **change))  # type: ignore[arg-type]
    assert fault in entry.faults()


def test_a_turn_of_pairs_counts_every_role_and_no_epilogue() -> None:
    code = replace(CODE, target=100, sass=PAIRS)
    turn = turn_of(Entry(100, "pairs", 128, TABLE[100, "pairs", 128], code))
    assert (turn.instructions, turn.warps, turn.exponentials) == (2, 8, 1)
    assert turn.others == 2 + 3 * 4
    assert turn.masking == 1
    assert (turn.queries, turn.heads, turn.flops) == (128, 2, 8 * 128**3)


def test_warps_that_do_not_meet_before_they_arrive_are_a_fault() -> None:
    ptx = "st.shared.b32 [a], b;\nmbarrier.arrive.shared::cta.b64 _, [c];"
    code = replace(CODE, target=100, sass=PAIRS, ptx=ptx)
    entry = Entry(100, "pairs", 128, TABLE[100, "pairs", 128], code)
    assert "1 arrivals before all warps have met" in entry.faults()


def test_a_kernel_in_gluon_whose_warps_have_no_roles_is_a_fault() -> None:
    code = replace(CODE, target=100, sass=PAIRS, warps=4)
    entry = Entry(100, "pairs", 128, TABLE[100, "pairs", 128], code)
    assert "warps are not specialised" in entry.faults()


def test_masked_turns_that_round_otherwise_are_a_fault() -> None:
    sass = PAIRS.replace("FSEL R2, R2, R3, P0", "FFMA R2, R2, R3, R4")
    code = replace(CODE, target=100, sass=sass)
    entry = Entry(100, "pairs", 128, TABLE[100, "pairs", 128], code)
    assert "masked turns reckon otherwise" in entry.faults()
    same = replace(entry, code=replace(code, sass=PAIRS))
    assert "masked turns reckon otherwise" not in same.faults()


def test_a_longer_loop_breaks_the_budget() -> None:
    more = "        /*0015*/                   FADD R1, R1, R1 ;\n" * 800
    longer = LOOP.replace("        /*0020*/", more + "        /*0020*/")
    (fault,) = replace(ENTRY, code=replace(CODE, sass=longer)).faults()
    assert fault == "800 float instructions a turn, budget 428"


def test_products_that_each_wait_for_the_one_before_are_a_fault() -> None:
    wait = "        /*0015*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    faults = {}
    for count in (2, 3):
        sass = LOOP.replace("        /*0020*/", wait * count + "        /*0020*/")
        entry = Entry(
            90, "forward_sm90", 128, TABLE[90, "forward_sm90", 128], replace(CODE, sass=sass)
        )
        faults[count] = entry.faults()
    assert faults == {2: [], 3: ["3 waits for products a turn"]}


def test_a_turn_on_hopper_is_that_of_both_groups() -> None:
    turn = turn_of(Entry(90, "dkdv_sm90", 128, TABLE[90, "dkdv_sm90", 128], CODE))
    assert (turn.queries, turn.keys, turn.warps) == (64, 128, 8)
    assert turn.flops == 8 * 64 * 128**2
