"""Plain requests: what comes back, and what does not."""

from __future__ import annotations

import pytest

from hermes_pipeline.services.plain_http import ask


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:9/ü", "host", "x://y"])
def test_what_cannot_be_asked_gives_no_answer(url: str) -> None:
    assert ask(url) is None
