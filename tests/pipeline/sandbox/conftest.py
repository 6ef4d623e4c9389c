"""One warm sandbox for the tests that share it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from attacks.world import PATIENT, Wait, World
from hermes_pipeline.services.sandbox import Sandbox


@pytest.fixture(scope="module")
def wait() -> Iterator[Wait]:
    """Runs a coroutine to its end; always in the same loop."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def sandbox(wait: Wait) -> Iterator[Sandbox]:
    """A sandbox with one box, which does not start anew for a test."""
    sandbox = Sandbox(workers=1, limits=PATIENT)
    wait(sandbox.__aenter__())
    yield sandbox
    wait(sandbox.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """What attacks aim at."""
    with World() as world:
        yield world
