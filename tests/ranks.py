"""Checks that run in several processes over gloo, each in a test of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist


def run_ranks(file: str, check: str, ranks: int, store: Path) -> None:
    """Run ``check`` of a test file in ``ranks`` processes that meet at the file ``store``."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, file, check]
    processes = [
        subprocess.Popen([*command, str(rank), str(ranks), str(store)], env=env)
        for rank in range(ranks)
    ]
    try:
        deadline = time.monotonic() + 120
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < deadline, "the ranks wait for each other"
            time.sleep(0.02)  # where one has failed, the others would wait for it
        assert [p.poll() for p in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
            process.wait()


def be_a_rank(checks: Mapping[str, Any]) -> None:
    """What such a file does when it runs by itself: the check that it was given."""
    check, rank, ranks, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    checks[check](rank, ranks)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may yet free a tensor, which aborts a closing interpreter
