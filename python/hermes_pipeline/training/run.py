"""One rank of a training run, from the command line to the exit code."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import logging
import math
import os
import signal
import sys
import time
import types
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

from hermes_pipeline.errors import UserError
from hermes_pipeline.exits import (
    INTERRUPTED,
    MISTAKEN,
    SAME_S,
    STOPPED,
    UNREAD,
    say,
    stopping_signals,
)
from hermes_pipeline.services.folders import explain, writing
from hermes_pipeline.services.progress import Counter, progress
from hermes_pipeline.training import run_folder
from hermes_pipeline.training.job import Job, check_tokenizer, prepare
from hermes_pipeline.training.report import NonFiniteStep, StepReport

COMPLETE = 0
NOT_FINITE = 3  # a gradient; the step was not applied and nothing saved
LESS_MEMORY = (
    'lower data.local_rows or data.row_length, set training.recompute to "full", or train on more '
    "processes"
)

PARENT = "HERMES4_PARENT"  # the process whose end must end this one
PR_SET_PDEATHSIG = 1


class StopRequest:
    """SIGTERM and Ctrl-C as a request to stop after the step; a later one stops at once.

    What comes so soon after the first is the same one: launchers hand on what a terminal has sent
    to all.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.training = False  # before the first step there is nothing to wait for
        self._asked_s = -math.inf
        for number in stopping_signals():
            signal.signal(number, self._on_signal)
        # The launcher starts us deaf, so that none comes before it is heard.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))

    def __call__(self) -> bool:
        return self.exit_code is not None

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        now, repeated = time.monotonic(), self.exit_code not in (None, UNREAD)
        if repeated and now - self._asked_s <= SAME_S:
            return
        self._asked_s = now
        self.exit_code = INTERRUPTED if number == signal.SIGINT else STOPPED
        if not self.training:
            self._end("interrupted before a step was taken; run the same command again to go on")
        if repeated:
            self._end("stopped at once; the same command goes on from the last checkpoint")

    def _end(self, text: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # where nobody reads it, the code says it
                os.write(2, f"train: {text}\n".encode())
        os._exit(self.exit_code or 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; the exit code says how it ended."""
    stop = StopRequest()
    _end_with_parent()
    faulthandler.enable()
    options = _options(arguments)
    _one_process_where_nobody_says_otherwise()
    rank = int(os.environ["RANK"])
    try:
        job = prepare(
            options.recipe,
            store=options.store,
            model=options.model,
            out=options.out,
            settings=options.set or [],
            processes=int(os.environ["WORLD_SIZE"]),
        )
        if job.complete:
            _say(rank, job.completion())
            return COMPLETE
        if PARENT not in os.environ:  # else it has looked
            check_tokenizer(job)
        with writing(job.folder), run_folder.locked(job.folder, rank):
            return _run(job, rank, stop)
    except UserError as error:
        local_rank = int(os.environ.get("LOCAL_RANK", rank))  # a machine may lack what others have
        _say(local_rank, f"error: {error}", name="hermes4")
        return MISTAKEN
    except NonFiniteStep as error:
        _say(rank, f"error: {error}", name="hermes4")
        return NOT_FINITE
    except BrokenPipeError:  # of progress
        return UNREAD
    except OSError as error:  # as of any other command; see `cli`
        if os.environ.get("HERMES4_TRACEBACK"):
            raise
        _say(0, f"error: {explain(error)}", name="hermes4")  # it may be of this rank alone
        return MISTAKEN
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("HERMES4_TRACEBACK") or not _is_out_of_memory(error):
            raise
        what = next(iter(str(error).splitlines()), "MemoryError")
        _say(0, f"error: rank {rank} has no memory left: {what}; {LESS_MEMORY}", name="hermes4")
        return MISTAKEN


def _is_out_of_memory(error: Exception) -> bool:
    """Of a device, or of the machine, which PyTorch says by a plain RuntimeError."""
    told = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return told or isinstance(error, MemoryError)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hermes_pipeline.training",
        description="One rank of a training run; start it with torchrun, or use `hermes4 train`.",
    )
    parser.add_argument("--recipe", required=True, help="a recipe of the project, or a .toml file")
    parser.add_argument("--store", type=Path, help="token store; over the recipe's")
    parser.add_argument("--model", help="start weights in Hugging Face form; over the recipe's")
    parser.add_argument("--out", type=Path, help="run folder; over the recipe's")
    parser.add_argument("--set", action="append", metavar="SECTION.KEY=VALUE", help="one setting")
    return parser.parse_args(arguments)


def _one_process_where_nobody_says_otherwise() -> None:
    """What torchrun would have set."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _end_with_parent() -> None:
    """Let the kernel end this process with its launcher, which may itself be killed.

    torchrun's workers live in sessions of their own and would outlive it.
    """
    parent = os.environ.get(PARENT)
    if parent is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != int(parent):
        os._exit(1)


def _run(job: Job, rank: int, stop: StopRequest) -> int:
    """Train, with the run folder held."""
    _log_to(job.folder, rank)
    if rank == 0:
        job = _begin(job)
        for note in job.notes:
            _say(rank, note)
            logging.getLogger(__name__).info(note)
    _without_datasets()
    from hermes_pipeline.training.titan import engine

    config = engine.trainer_config(
        job.recipe,
        job.shape,
        local_rows=job.recipe.local_rows(int(os.environ["WORLD_SIZE"])),
        store=job.store.folder,
        model=job.model,
        out=job.folder,
        step=job.step,
    )
    with ExitStack() as stack:
        observer = _Observer(job, rank, stop, stack)

        def begin(step: int) -> None:
            stack.enter_context(run_folder.join_lock(job.folder, rank))
            observer.begin(step)
            stop.training = True

        complete = engine.run(
            config, facts=job.facts(), begin=begin, observe=observer, asked_to_stop=stop
        )
    if complete:
        _say(rank, f"run {job.folder} is complete after step {observer.step}")
        return COMPLETE
    _say(rank, f"stopped after step {observer.step}; the same command goes on from its checkpoint")
    return stop.exit_code if stop.exit_code is not None else STOPPED


def _begin(job: Job) -> Job:
    """Write what the run is into its folder, and clear away saves that were cut off.

    Raises:
        UserError: another job has been here since ours was checked, before the folder was held.
    """
    steps = run_folder.checkpoint_steps(job.folder)
    begun = run_folder.read_record(job.folder) is not None
    if (begun, steps[-1] if begun and steps else 0) != (job.begun, job.step):
        raise UserError(
            f"another job has changed run folder {job.folder} while this one was loading; the same "
            f"command goes on from where that left off"
        )
    run_folder.remove_torn_checkpoints(job.folder)
    run_folder.write_record(  # first: it says whose the folder is
        job.folder,
        job.recipe,
        store=job.store.folder,
        fingerprint=job.store.fingerprint,
        model=None if job.recipe.model.path is None else Path(job.recipe.model.path),
    )
    if job.model is not None:
        run_folder.write_model_files(job.folder, job.model, job.store)
    return job


def _log_to(folder: Path, rank: int) -> None:
    """Send what torchtitan and torch say to a file; other ranks' warnings to one of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "log.txt" if rank == 0 else f"log.rank{rank}.txt"
    handler = _Log(folder / name, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)


class _Log(logging.FileHandler):
    """Drops what a full disk will not take: a run ends for its results, not for its log."""

    def handleError(self, record: logging.LogRecord) -> None: ...


def _without_datasets() -> None:
    """Keep torchtitan from importing Hugging Face datasets, which takes longer than all the rest.

    Its validator imports its own data loaders; rows that are ready need neither.
    """
    for name, members in {
        "datasets": ("Dataset", "load_dataset"),
        "datasets.distributed": ("split_dataset_by_node",),
    }.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, None)
        sys.modules.setdefault(name, module)


class _Observer:
    """Keeps metrics.jsonl and shows progress, on the first rank."""

    def __init__(self, job: Job, rank: int, stop: StopRequest, stack: ExitStack) -> None:
        self._job, self._rank, self._stop, self._stack = job, rank, stop, stack
        self._metrics: run_folder.Metrics | None = None
        self._counter: Counter | None = None
        self.step = 0

    def begin(self, step: int) -> None:
        self.step = step
        if self._rank != 0:
            return
        self._metrics = run_folder.Metrics(self._job.folder, step=step)
        self._stack.callback(self._metrics.close)
        steps = self._job.recipe.training.steps
        if step:
            _say(self._rank, f"going on from step {step} of {steps}")
        elif self._job.begun:
            _say(self._rank, "beginning anew: the run has no checkpoint")
        self._counter = self._stack.enter_context(
            progress("train", total=steps, unit="steps", done=step)
        )

    def __call__(self, report: StepReport) -> None:
        self.step = report.step
        if self._metrics is not None and self._counter is not None:
            self._metrics.write(report)
            note = (
                f"loss {report.loss:.4f}, gradient norm {report.grad_norm:.3f}, "
                f"{report.tokens / report.seconds:,.0f} tokens/s"
            )
            try:
                self._counter.advance(1, note)
            except BrokenPipeError:
                if not self._stop():
                    self._stop.exit_code = UNREAD  # once this far is saved


def _say(rank: int, text: str, *, name: str = "train") -> None:
    if rank == 0:
        say(f"{name}: {text}")
