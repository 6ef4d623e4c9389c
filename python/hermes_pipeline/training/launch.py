"""Start the ranks of a run on this machine, and leave none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hermes_pipeline.exits import stopping_signals
from hermes_pipeline.training.run import PARENT

POLL_S = 0.05
GRACE_S = 5.0  # for the other ranks, after one has failed


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``python -m hermes_pipeline.training`` on so many processes; the exit code of the run.

    The ranks end with this process, also when it is killed. SIGTERM and Ctrl-C are handed on to
    them, a terminal that closes as SIGTERM: they finish their step and save it.
    """
    with _meeting_point(processes) as where:
        ranks = [_start(arguments, rank, processes, where) for rank in range(processes)]
        try:
            with _signals_handed_to(ranks):
                return _outcome(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()


@contextmanager
def _meeting_point(processes: int) -> Iterator[dict[str, str]]:
    """Where the ranks find one another, for their environment.

    This process hosts the store, as torchrun does, so that its port is bound before it is named.
    """
    if processes == 1:
        yield {"MASTER_PORT": "0"}
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch._C._distributed_c10d import TCPStore

    store: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def _start(
    arguments: Sequence[str], rank: int, processes: int, where: dict[str, str]
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        PARENT: str(os.getpid()),
        **where,
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name of this machine need resolve
    # A rank hears signals once it can answer them: see `run.StopRequest`.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "hermes_pipeline.training", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # gloo's chatter; a rank speaks on standard error
            start_new_session=True,  # Ctrl-C reaches this process alone, which hands it on
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _outcome(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all ranks; the first failure ends the others."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return _after_failure(ranks)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_S)


def _after_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code that tells most, once the others have had time to give theirs."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(POLL_S)
    codes = [process.poll() for process in ranks]
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            sys.stderr.write(f"hermes4: error: rank {rank} of the run was ended by {name}\n")
            return 128 - code
    told = [code for code in codes if code]
    return max(told, key=lambda code: code != 1)


@contextmanager
def _signals_handed_to(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may; the ranks still end with this process
        return

    def hand_on(number: int, frame: types.FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in stopping_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
