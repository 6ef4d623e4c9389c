"""The Hugging Face hub: can it be reached, before anyone waits for it?"""

from __future__ import annotations

import socket
import threading
import urllib.parse
import urllib.request
from pathlib import Path

from hermes_pipeline.errors import UserError
from hermes_pipeline.exits import say

WAIT_S = 5.0  # for a first connection; the libraries behind it try for a minute


def reach_hub(kind: str, name: str, repositories: str, *caches: Path) -> bool:
    """Say that the hub will be asked for ``name``; is it within reach?

    Args:
        kind: what ``name`` shall be, in words.
        repositories: what the hub calls these: models or datasets.
        caches: where an earlier download may lie, beside the hub's own cache.

    Raises:
        UserError: it is not, and nothing was downloaded before.
    """
    say(f"{kind} {name!r} is no file or folder here: asking the Hugging Face hub")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    reason = _why_not(constants.ENDPOINT)
    if reason is None:
        return True
    own = Path(constants.HF_HUB_CACHE) / f"{repositories}--{name.replace('/', '--')}"
    if not any(path.exists() for path in (own, *caches)):
        raise UserError(
            f"{kind} {name!r} is no file or folder here, and {constants.ENDPOINT} cannot be "
            f"reached ({reason}); give a path that exists, or a connection"
        )
    say(f"{constants.ENDPOINT} cannot be reached ({reason}): taking what was downloaded before")
    return False


def _why_not(address: str) -> str | None:
    """Why nobody answers at an address, or at the proxy before it; None where somebody does."""
    url = urllib.parse.urlsplit(address)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = url.port or (80 if url.scheme == "http" else 443)
    reasons: list[str | None] = [f"no answer in {WAIT_S:.0f} s"]

    def connect() -> None:
        try:
            socket.create_connection((url.hostname or "", port), timeout=WAIT_S).close()
            reasons.append(None)
        except OSError as error:
            reasons.append(error.strerror or str(error))

    # In a thread: looking up a name has no limit of its own.
    trial = threading.Thread(target=connect, daemon=True)
    trial.start()
    trial.join(WAIT_S)
    return reasons[-1]
