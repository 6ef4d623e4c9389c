"""Whatever returns a verdict: functions from a trace and its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from hermes_pipeline.records import Trace, Verdict
from hermes_pipeline.verifiers.math import verify_boxed, verify_boxed_text

Verifier = Callable[[Trace, str], Verdict]

VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {
        "boxed": verify_boxed,
        "boxed_text": verify_boxed_text,
    }
)
