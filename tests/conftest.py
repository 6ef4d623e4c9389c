"""Fixtures for every test."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# Kernels are interpreted. Triton asks when it is imported, so it must be said here; to run what is
# marked gpu, say TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Where the tests run in the background, Ctrl-C is ignored, and by every process they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# And under nohup a hang-up: it still does nothing to us, and to them what it does to any program.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# A slow machine is no defect.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real public data, where somebody has put it; the test is skipped where not."""
    folder = Path(os.environ.get("HERMES4_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set HERMES4_SHARED to its parent folder")
    return folder
