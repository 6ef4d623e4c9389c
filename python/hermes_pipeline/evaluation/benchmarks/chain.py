"""Chains of sums modulo 10 that training never sees: the demo's benchmark."""

from __future__ import annotations

from hermes_pipeline.evaluation.benchmark import Benchmark
from hermes_pipeline.tasks.chain import Chain, build_prompt, chains
from hermes_pipeline.verifiers.math import verify_boxed_text

SEED, ITEMS = 1, 400

CHAIN: Benchmark[Chain] = Benchmark(
    name="chain",
    items=lambda: chains(SEED, ITEMS),
    prompt=build_prompt,
    # As text: the two values are digits side by side, no number of their own.
    score=lambda trace, prompt: verify_boxed_text(trace, prompt.target),
)
