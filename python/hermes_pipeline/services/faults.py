"""What a try that brought no answer means, for its request and for the address it went to."""

from __future__ import annotations

from dataclasses import dataclass

RETRIED = frozenset({408, 409, 425, 429})  # and every 5xx
UNTAKEN = frozenset({502, 503})  # nobody has begun with it: asking again costs nothing
HOPELESS = frozenset({401, 403, 404})  # no other request would fare better there
HOPELESS_CODES = frozenset({"insufficient_quota", "invalid_api_key", "model_not_found"})


class EndpointError(Exception):
    """A request failed for good.

    Attributes:
        status: HTTP status of the last reply; None when there was none.
        hopeless: the address, the key or the model's name is wrong, the quota or the run's time is
            used up: every other request would fail, too.
    """

    def __init__(self, message: str, status: int | None = None, *, hopeless: bool = False) -> None:
        super().__init__(message)
        self.status, self.hopeless = status, hopeless


@dataclass(frozen=True, slots=True)
class Fault:
    """A try that brought no answer."""

    problem: str
    status: int | None = None
    is_final: bool = False
    is_wrong: bool = False  # no other request would fare better at this address
    is_gone: bool = False  # nobody was there to take the request
    pause_asked: bool = False  # the address is paused already

    @property
    def is_throttled(self) -> bool:
        return self.status == 429
