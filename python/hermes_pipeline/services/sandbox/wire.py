"""What boxes are given and what they answer, as bytes; and what all of them have in common."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hermes_pipeline.services.sandbox.jobs import Ended, Job, Result

READY_S = 60.0  # until a box must have said that it is ready; a busy machine is slow
GRACE_S = 10.0  # after the wall limit, until the box counts as dead
FIRST_USER = 60600  # ids that Debian and systemd leave alone; a box takes this plus its slot
# One seed of hashes, so that a program's order of a set is the same in every run.
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_BROKEN: Mapping[str, tuple[Ended, str]] = {
    "wall_s": ("timeout", "ran longer than {wall_s:g} s"),
    "cpu_s": ("timeout", "used more than {cpu_s:g} s of processor time"),
    "memory_bytes": ("memory", "used more than {memory_bytes:,} bytes of memory"),
    "files": ("memory", "made more than {files:,} files"),
    "output": ("output", "wrote more than {output_bytes:,} bytes to one stream"),
}


def pack_job(job: Job) -> bytes:
    """What the program inside needs to know of a job."""
    files = dict(job.files)
    if not job.command:
        # A lone surrogate, which is no text, becomes a question mark.
        files["main.py"] = job.source.encode(errors="replace")
    return json.dumps(
        {
            "files": {path: content.decode("latin-1") for path, content in files.items()},
            "function": job.function,
            "arguments": list(job.arguments),
            "command": list(job.command),
        }
    ).encode()


def read_end(job: Job, end: Mapping[str, Any], streams: Sequence[bytes], box: str) -> Result:
    """What the program inside tells of a job's end, as a result.

    Args:
        streams: standard output, standard error and, of a call, the value; more than is allowed
            where that was written. What is not UTF-8 is replaced.
    """
    most = job.limits.output_bytes
    out, err, *values = (each[:most].decode(errors="replace") for each in streams)
    code, value = end["code"], None
    broken = end["broken"] or ("output" if any(len(each) > most for each in streams) else "")
    # The kernel may be faster than the watch.
    if code in (-signal.SIGKILL, -signal.SIGXCPU) and end["cpu_s"] >= job.limits.cpu_s:
        broken = broken or "cpu_s"
    ended: Ended = "ok"
    reason = ""
    if broken:
        ended, words = _BROKEN[broken]
        code, reason = None, words.format(**asdict(job.limits))
    elif code is None:
        ended, reason = "killed", "ended by the kernel, as when the machine is out of memory"
    elif code < 0:
        ended, reason = "killed", f"ended by {_signal_name(-code)}"
    elif code > 0:
        no_memory = err.rstrip().rpartition("\n")[2].startswith("MemoryError")
        ended, reason = ("memory" if no_memory else "error"), f"exit code {code}"
    elif job.function:
        try:
            value = json.loads(values[0])
        except (ValueError, RecursionError):
            ended, reason = "error", f"ended without a value of {job.function}"
    return Result(ended, code, out, err, end["cpu_s"], end["wall_s"], box, reason, value)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time one
        return f"signal {number}"
