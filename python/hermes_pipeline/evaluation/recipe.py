"""Every setting of `hermes4 evaluate`, read from a TOML file and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from hermes_pipeline.config import Count
from hermes_pipeline.services.cluster import Cluster
from hermes_pipeline.services.endpoint import Sampling
from hermes_pipeline.services.serving import Model, Requests


@dataclass(frozen=True, slots=True)
class Questions:
    """[benchmark]: what is asked."""

    name: str | None = None
    limit: Count | None = None  # only so many items
    draws: Count | None = None  # answers to each item; the benchmark's own number if None


@dataclass(frozen=True, slots=True)
class Run:
    """[run]: where scores and answers go."""

    out: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run of `hermes4 evaluate`."""

    benchmark: Questions = field(default_factory=Questions)
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)
    requests: Requests = field(default_factory=Requests)
    ray: Cluster = field(default_factory=Cluster)
    run: Run = field(default_factory=Run)
