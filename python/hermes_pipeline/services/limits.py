"""When a request may be sent, and where: rates, pauses servers ask for, addresses that fail."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import resource
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from hermes_pipeline.errors import UserError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
LONGEST_ASKED_PAUSE_S = 120.0  # a server that wants longer is asked again after this
FIRST_ASIDE_S, LONGEST_ASIDE_S = 1.0, 30.0
CATCH_UP_S = 0.01  # a bucket that was held up makes good this much: 1 % of a second

_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


# When a quota is full again.
RESETS = ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")


class Bucket:
    """Lets an amount through each second, in the order of asking, whatever came before.

    In any second at most 1 % more than ``per_s`` passes, and one request: a bucket that is full
    at the start would let twice the rate through the first second.
    """

    def __init__(self, per_s: float) -> None:
        if not per_s > 0:
            raise UserError(f"a rate of {per_s} a second lets nothing through; give a larger one")
        self._per_s = per_s
        self._free_at = 0.0
        self._waiting: deque[tuple[asyncio.Future[None], float]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def takes_now(self, amount: float) -> bool:
        """Take ``amount`` if nobody has to wait for it."""
        now = asyncio.get_running_loop().time()
        if self._waiting or self._free_at > now:
            return False
        self._spend(amount, now)
        return True

    async def take(self, amount: float) -> None:
        """Wait until ``amount`` may pass; who stops waiting takes nothing."""
        if self.takes_now(amount):
            return
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append((future, amount))
        if self._timer is None:
            self._timer = loop.call_at(self._free_at, self._release)
        await future

    def charge(self, amount: float) -> None:
        """Count what a request cost beyond what it took; a negative amount is given back."""
        self._free_at += amount / self._per_s
        if self._timer is not None:
            self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(self._free_at, self._release)

    def _spend(self, amount: float, now: float) -> None:
        self._free_at = max(self._free_at, now - CATCH_UP_S) + amount / self._per_s

    def _release(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._waiting:
            future, amount = self._waiting[0]
            if not future.done():  # its task may have been cancelled
                if self._free_at > now:
                    self._timer = loop.call_at(self._free_at, self._release)
                    return
                self._spend(amount, now)
                future.set_result(None)
            self._waiting.popleft()


class TooLate(Exception):
    """The time of a request is up, or will be before it may go on."""


@dataclass(slots=True, eq=False)
class Address:
    """One address of a model; times are the event loop's."""

    url: str
    shown: str  # without a login
    secrets: tuple[str, ...] = ()  # every form of the key and the login, long ones first
    in_flight: int = 0
    paused_until: float = 0.0  # nothing is sent before: the server asked for it
    aside_until: float = 0.0  # others are preferred before: it failed
    faults: int = 0  # times it was set aside since it last answered
    is_wrong: bool = False  # it refuses whatever it is asked: no such model there, for one

    def pause(self, until: float) -> None:
        self.paused_until = max(self.paused_until, until)

    def set_aside(self, now: float) -> None:
        """Prefer others for a while, for longer each time; calls of one outage count once."""
        if now >= self.aside_until:
            self.aside_until = now + min(LONGEST_ASIDE_S, FIRST_ASIDE_S * 2 ** min(self.faults, 30))
            self.faults += 1

    def answered(self) -> None:
        self.aside_until, self.faults, self.is_wrong = 0.0, 0, False

    def clean(self, text: str) -> str:
        """The text without the key and the login, should a server have echoed them."""
        text = text.replace(self.url, self.shown)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def read_address(url: str, key: str) -> Address:
    """The address of a base URL, which goes up to and with `/v1`.

    Raises:
        UserError: it is none, says more, or its login would stand in the way of a key.
    """
    if "?" in url or "#" in url:  # often a key: nothing of it is shown
        raise UserError(
            "a base URL holds a ? or #, behind which no path can stand; end it with /v1, and give "
            "a key as OPENAI_API_KEY"
        )
    try:
        parts = urlsplit(url)
    except ValueError as error:  # brackets that do not close; the URL may hold a login
        raise UserError(f"a base URL is invalid: {error}") from None
    login, _, host = parts.netloc.rpartition("@")
    shown = urlunsplit(parts._replace(netloc=host)).rstrip("/")
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"base URL {shown!r} wants the form http://host:port/v1")
    if login and key:
        raise UserError(
            f"base URL {shown} carries a login and OPENAI_API_KEY is set; only one can be sent, "
            f"so remove one"
        )
    return Address(url.rstrip("/"), shown, _forms((key, *_of_login(login))))


def _of_login(login: str) -> tuple[str, ...]:
    """What no message may hold of a login: itself, its password, and what a header makes of it."""
    if not login:
        return ()
    user, _, password = map(unquote, login.partition(":"))
    header = base64.b64encode(f"{user}:{password}".encode("latin-1", "replace")).decode()
    return login, f"{user}:{password}", password or user, header.rstrip("=")


def _forms(secrets: Iterable[str]) -> tuple[str, ...]:
    """The secrets as they stand and as JSON writes them, long ones first."""
    forms = {form for secret in secrets for form in (secret, json.dumps(secret)[1:-1])}
    forms |= {form.replace("/", "\\/") for form in forms}
    return tuple(sorted(forms - {""}, key=len, reverse=True))


def read_key(name: str) -> str:
    """A secret of the environment; empty where there is none.

    Raises:
        UserError: no header can carry it.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{name} holds characters that no header can carry")
    return key


def choose(addresses: Sequence[Address], now: float, failed: Sequence[Address] = ()) -> Address:
    """The address for the next request; one that is paused only when all are.

    An address that was set aside gets one request when its time is over, and the next only after
    an answer or another while.

    Args:
        failed: where the request has failed so far, each time; it goes where it did so least.
    """
    if len(addresses) == 1:
        return addresses[0]

    def rank(address: Address) -> tuple[float, bool, int, int]:
        pause = max(0.0, address.paused_until - now)
        return pause, address.aside_until > now, failed.count(address), address.in_flight

    def returns(address: Address) -> bool:
        return address.faults > 0 and max(address.aside_until, address.paused_until) <= now

    returning = (a for a in addresses if returns(a) and a not in failed)
    best = next(returning, None) or min(addresses, key=rank)
    if returns(best):
        best.set_aside(now)  # from the others' point of view, until this one is answered
    return best


async def sleep(seconds: float, deadline: float) -> None:
    """Sleep; raises `TooLate` at once when the deadline would pass meanwhile."""
    if asyncio.get_running_loop().time() + seconds >= deadline:
        raise TooLate
    await asyncio.sleep(seconds)


async def wait(waiting: Coroutine[Any, Any, None], deadline: float) -> None:
    """Wait; raises `TooLate` at the deadline."""
    try:
        async with asyncio.timeout_at(deadline):
            await waiting
    except TimeoutError:
        raise TooLate from None


def backoff_s(attempt: int) -> float:
    """A pause before try ``attempt + 1``: exponential with full jitter."""
    return random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempt, 30)))


def asked_pause_s(headers: Mapping[str, str], now: float) -> float | None:
    """The seconds a server asks to wait; None when it does not say.

    Args:
        headers: of its reply; names in any case where the mapping allows it.
        now: seconds since 1970, where the server does not send its own date.
    """
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        if (pause := _number(headers.get(name))) is not None:
            return _within(pause / 1000)
    if (after := headers.get("retry-after")) is not None:
        if (pause := _number(after)) is not None:
            return _within(pause)
        if (date := _date(after)) is not None:
            return _within(date - (_date(headers.get("date")) or now))
    resets = [pause for name in RESETS if (pause := _span(headers.get(name))) is not None]
    return _within(max(resets)) if resets else None


def _within(pause: float) -> float:
    return min(LONGEST_ASKED_PAUSE_S, max(0.0, pause))


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text or "").timestamp()
    except (ValueError, OverflowError):  # no date, one with an offset of millennia
        return None


def _span(text: str | None) -> float | None:
    """Seconds in "6m0s", "20ms" or "1.5"; None for nothing, and for 0 and -1, which say nothing."""
    text = (text or "").strip()
    seconds = _number(text)
    if seconds is None and re.fullmatch(f"({_SPAN.pattern})+", text):
        seconds = sum(float(n) * _SECONDS[unit] for n, unit in _SPAN.findall(text))
    return seconds if seconds is not None and seconds > 0 else None


def allow_files(wanted: int) -> None:
    """Raise the limit of open files as far as it goes; a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"so many requests in flight want {wanted} open files, of which {hard} are allowed; "
            f"lower the concurrency, or raise `ulimit -n`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
