"""Every setting of `hermes4 complete`, read from a TOML file and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from hermes_pipeline.config import Count
from hermes_pipeline.services.account import Prices
from hermes_pipeline.services.cluster import Cluster
from hermes_pipeline.services.endpoint import Sampling
from hermes_pipeline.services.serving import Model, Requests


@dataclass(frozen=True, slots=True)
class Data:
    """[data]: the conversations that are to be answered."""

    name: str | None = None  # a file, a folder of them, or a data set of the Hub
    revision: str | None = None
    split: str = "train"
    subset: str | None = None
    limit: Count | None = None  # read only so many records
    system: str | None = None  # the system message of conversations that have none


@dataclass(frozen=True, slots=True)
class Run:
    """[run]: where the answers go, and how many."""

    out: str | None = None
    draws: Count = 4  # answers to each conversation
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run of `hermes4 complete`."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)
    requests: Requests = field(default_factory=Requests)
    prices: Prices = field(default_factory=Prices)
    ray: Cluster = field(default_factory=Cluster)
    run: Run = field(default_factory=Run)
