"""The loss's benchmark: its gates can fail, and its kernels pass the one on machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import loss, loss_gpu, loss_static
from bench.harness import chosen
from bench.machine_code import MachineCode
from hermes_core import loss_chunks, loss_weight

GOOD = MachineCode(
    target=90, ptx="", ttgir="", registers=48, stack_bytes=0, shared_bytes=64,
    tensor_memory_columns=0, warps=8,
    sass="  /*0000*/  LDG.E.128 R4 ;\n  /*0010*/  STG.E.128 R4 ;\n",
)  # fmt: skip


def test_machine_code_of_every_kernel_passes_its_gate(repository: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "loss", "--static", "--json"]
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = [r for r in results if r["op"] == "loss, static"]
    # Capped or not, rows held of two lengths; and the one that scales.
    kernels = 2 * (len(loss_static.POINTERS) + 1) + 1
    assert len(compiled) == kernels * len(loss_static.TARGETS)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"registers": 91}, "91 registers a thread, at most 64"),
        ({"sass": GOOD.sass.replace("LDG.E.128", "LDG.E.U16")}, "no 128-bit load of logits"),
        ({"sass": GOOD.sass.replace("STG.E.128", "STG.E")}, "no 128-bit store of gradients"),
        ({"sass": GOOD.sass + "  /*0020*/  STL [R1] ;\n"}, "1 spill instructions"),
    ],
)
def test_machine_code_that_got_worse_is_named(change: dict[str, object], fault: str) -> None:
    kernel = "loss_and_gradient_kernel"
    assert loss_static.faults(kernel, GOOD) == []
    assert loss_static.faults(kernel, replace(GOOD, **change)) == [fault]  # type: ignore[arg-type]


def test_prediction_of_the_whole_is_worked_out_by_hand() -> None:
    """One chunk of 1,000 rows, V 2,000, D 100: 1.2 GFLOP; 20 MB of logits, 0.4 MB of weights."""
    chip = loss_static.Chip("round", half=1.25e12, single=1e12, memory=1e12)
    algorithm = loss_static.ALGORITHMS[0]
    ms = loss_static.predicted_ms(algorithm, chip, 4_000, 1_000, 2_000, 100)
    assert ms == pytest.approx(1.2 + (20e6 + 2 * 0.2e6 + 4 * 0.2e6) / 1e9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own
def test_every_peer_passes_the_gate() -> None:
    loss.gate([peer for peer in loss.peers() if "compile" not in peer.name])


@pytest.mark.parametrize("factor", [0.5, torch.nan])
def test_a_wrong_peer_is_given_no_time(factor: float) -> None:
    def wrong(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        return factor * loss.eager(hidden, weight, labels, kept)

    with pytest.raises(SystemExit, match=r"peer is wrong in torch\.float32"):
        loss.gate([loss.Peer("peer", wrong, compacts=False)])


def test_a_peer_that_raises_is_told_in_one_line_and_given_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent() -> loss.Call:
        raise ImportError("no such module")

    def refuse(*_: object) -> Tensor:
        raise AssertionError("bf16 alone\nand a long story")

    def halve(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        return loss.eager(hidden, weight, labels, 2 * kept)

    monkeypatch.setattr(loss_gpu, "DEVICE", "cpu")
    case = loss_gpu.Case("30%", loss.problem(8, 16, 8, 1.0, torch.bfloat16))
    our = loss_gpu.Timed(1.0, 1.0, 1.0, 7, 0.0)
    told = [
        list(loss_gpu.of_peer("peer", load, [case], [our], 1e12))
        for load in (absent, lambda: refuse, lambda: halve)
    ]
    assert told[:2] == [
        ["peer: skipped (ImportError: no such module)"],
        ["peer: skipped (AssertionError: bf16 alone)"],
    ]
    assert str(told[2][0]).startswith("peer: skipped (SystemExit: peer is wrong in torch.bfloat16")


def test_peak_memory_counts_what_was_freed_again() -> None:
    def wasteful(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        torch.ones(50_000_000)  # 200 MB for a moment
        return loss.ours(hidden, weight, labels, kept)

    given = loss.problem(64, 301, 8, 0.5, torch.float32)
    assert loss.Step("wasteful", wasteful, given).peak_mb() > 190
    assert loss.Step("ours", loss.ours, given).peak_mb() < 20


def test_memory_in_bf16_is_that_of_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 tokens have 77 MB of logits: 256 of them in the chunk, 28 are computed again."""
    monkeypatch.setitem(loss_chunks.CPU_CHUNK_BYTES, 2, 2**26)
    monkeypatch.setattr(loss_weight, "WIDENED_TILE", 2**9)  # a MB, not 5
    given = loss.problem(300, 128_256, 16, 1.0, torch.bfloat16)
    ours = loss.Step("ours", loss.ours, given)
    peaks = [ours.peak_mb() for _ in range(3)]
    assert 60 < min(peaks) < 75  # what else the process does can only add


def test_who_is_slow_is_timed_once_and_all_others_by_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    def named(name: str) -> loss.Call:
        def call(hidden: Tensor, weight: Tensor, *_: object) -> Tensor:
            order.append(name)
            end = time.process_time() + (0.3 if name == "slow" else 0)
            while time.process_time() < end:
                pass
            return hidden.sum() + weight.sum()

        return call

    monkeypatch.setattr(loss, "SLOW_S", 0.3)
    given = loss.problem(4, 8, 4, 1.0, torch.float32)
    mine, slow, quick = (loss.Step(name, named(name), given) for name in ("mine", "slow", "quick"))
    found = loss.timed(mine, [slow, quick])
    first, peaks = ["slow", "slow", "quick", "quick"], ["mine", "slow", "quick"]
    assert order == first + ["mine", "mine", "quick", "quick"] * loss.RUNS + peaks
    runs = {name: timing.runs for name, (timing, _) in found.items()}
    assert runs == {"mine": loss.RUNS, "slow": 1, "quick": loss.RUNS}


def test_shapes_are_chosen_by_a_part_of_their_name() -> None:
    names = list(loss.cpu_shapes())
    assert len(chosen(names, "")) == len(names) == 4
    for name in chosen(names, "float32"):
        assert loss.cpu_shapes()[name][2] == torch.float32
    with pytest.raises(SystemExit, match="no shape has 'fp8' in its name: V 32,768, D 1,024"):
        chosen(names, "fp8")
