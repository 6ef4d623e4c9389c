"""One plain request at a time: for what is asked now and then, and may get no answer."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple

TIMEOUT_S = 5.0


class Said(NamedTuple):
    """What came back."""

    status: int
    text: str

    def json(self) -> Any:
        """The text read as JSON; None where it is none."""
        try:
            return json.loads(self.text)
        except ValueError:
            return None


def ask(
    url: str,
    body: Mapping[str, object] | None = None,
    *,
    method: str | None = None,
    key: str = "",
    timeout_s: float = TIMEOUT_S,
) -> Said | None:
    """The answer to one request, whatever its status; None when there was none.

    Args:
        url: may be somebody else's word; what is no address gives no answer.
        body: sent as JSON.
        method: GET if None, and POST where there is a body.
        key: sent as a bearer token; as `read_key` reads one.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    # Servers of ours and of the cluster: no proxy stands between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, data, headers, method=method)
        with opener.open(request, timeout=timeout_s) as reply:
            return Said(int(reply.status), reply.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        with error:
            return Said(error.code, error.read().decode(errors="replace"))
    except (OSError, ValueError, http.client.HTTPException):
        return None
