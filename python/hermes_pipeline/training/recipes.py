"""Every setting of a training run, read from one TOML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from hermes_pipeline import config
from hermes_pipeline.config import Count, Range, Seed
from hermes_pipeline.errors import UserError

Fraction = Annotated[float, Range(low=0, high=1)]
SMALLEST, LARGEST = 1.2e-38, 3.4e38  # of float32's normal numbers, in which steps are computed
Positive = Annotated[float, Range(above=0, high=LARGEST)]
Base = Literal["qwen3_14b", "llama3.1_70b", "llama3.1_405b"]

# What may differ when a run goes on: where it stops, where it runs, how often it saves. None of
# these changes a step, beyond the rounding of sums taken in another order.
MAY_CHANGE = frozenset(
    {
        "data.store",  # the folder may move; its fingerprint may not change
        "data.local_rows",
        "model.path",  # the weights now come from the checkpoint
        "training.steps",
        "training.schedule_steps",
        "training.seed",  # no step draws from it
        "training.recompute",
        "parallel.tensor",
        "parallel.shard",
        "parallel.replicate",
        "parallel.timeout_s",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.background",
        "run.out",
    }
)


@dataclass(frozen=True, slots=True)
class Model:
    """[model]: the start weights, and the shape they must have; what is not given is theirs."""

    path: str | None = None  # folder in Hugging Face form
    base: Base | None = None  # a shape by name, instead of the keys below
    family: Literal["llama3", "qwen3"] | None = None
    layers: Count | None = None
    width: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    head_size: Annotated[int, Range(low=2)] | None = None
    ffn_width: Count | None = None
    vocab_size: Count | None = None  # None for `init`: the tokenizer's, rounded up
    tied: bool | None = None  # is the output head the embedding?
    norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    max_positions: Count | None = None
    embedding_std: Positive | None = None  # of `init`

    def __post_init__(self) -> None:
        if self.base is not None and any(
            getattr(self, key) is not None for key in ("family", *SHAPE_KEYS)
        ):
            raise ValueError(f"base = {self.base!r} gives the whole shape; leave out other keys")

    def shape(self) -> dict[str, Any]:
        """What the recipe says about the shape, by the names of `shape.Shape`."""
        keys = ("family", *SHAPE_KEYS)
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


SHAPE_KEYS = (
    "layers",
    "width",
    "heads",
    "kv_heads",
    "head_size",
    "ffn_width",
    "vocab_size",
    "tied",
    "norm_eps",
    "rope_theta",
    "max_positions",
)


@dataclass(frozen=True, slots=True)
class Data:
    """[data]: which rows, and in which order."""

    row_length: Annotated[int, Range(low=2)]
    rows: Annotated[int, Range(low=1, high=2**20)]  # of one step, over all processes
    packing: Literal["best", "exact_gap", "best_fit_decreasing", "first_fit_decreasing", "guided"]
    too_long: Literal["error", "drop", "truncate"]
    seed: Seed
    local_rows: Count | None = None  # of one forward pass on one process; None: its whole share
    store: str | None = None  # folder of `hermes4 tokenize`


@dataclass(frozen=True, slots=True)
class Optimizer:
    """[optimizer]: AdamW; matrices decay, norms do not."""

    learning_rate: Positive
    warmup_steps: Annotated[int, Range(low=0)]
    decay: Literal["cosine", "linear"]
    final_fraction: Fraction  # of the learning rate, which the step after the last would have
    beta1: Annotated[float, Range(low=0, high=0.9999999)]
    beta2: Annotated[float, Range(low=0, high=0.9999999)]
    eps: Annotated[float, Range(low=SMALLEST, high=LARGEST)]  # 0 would divide by nothing
    weight_decay: Annotated[float, Range(low=0, high=LARGEST)]
    max_grad_norm: Positive


@dataclass(frozen=True, slots=True)
class Training:
    """[training]: how long, and how the arithmetic is done."""

    steps: Count
    seed: Seed  # torch's; no step draws from it
    precision: Literal["bfloat16", "float32"]  # of matrix products; weights and sums are float32
    recompute: Literal["none", "selective", "full"]  # activations in the backward pass
    deterministic: bool  # bitwise equal runs on a GPU too, slower there
    schedule_steps: Count | None = None  # length of the learning-rate schedule; `steps` if None


@dataclass(frozen=True, slots=True)
class Parallel:
    """[parallel]: how processes share the work; tensor x shard x replicate is their number."""

    tensor: Count  # tensor parallel
    replicate: Count  # data parallel, whole copies
    shard: Annotated[int, Range(low=-1)]  # data parallel, sharded (FSDP); -1: what is left
    # A collective that takes longer is a failure; more than a year overflows in torch.
    timeout_s: Annotated[int, Range(low=1, high=31_536_000)]

    def __post_init__(self) -> None:
        if self.shard == 0:
            raise ValueError("shard must be at least 1, or -1 for what is left")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """[checkpoint]: what a stopped run goes on from."""

    every: Count  # steps
    keep: Annotated[int, Range(low=2)]  # the latest ones; one may be in the middle of its writing
    background: bool  # write while the next steps run


@dataclass(frozen=True, slots=True)
class Run:
    """[run]: where the results go."""

    out: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run."""

    model: Model
    data: Data
    optimizer: Optimizer
    training: Training
    parallel: Parallel
    checkpoint: Checkpoint
    run: Run

    def __post_init__(self) -> None:
        schedule = self.training.schedule_steps or self.training.steps
        if self.training.steps > schedule:
            raise ValueError(
                f"training.steps = {self.training.steps} goes past the learning-rate schedule, "
                f"training.schedule_steps = {schedule}"
            )
        if self.optimizer.warmup_steps > schedule:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is longer than the "
                f"learning-rate schedule of {schedule} steps"
            )

    def data_ranks(self, processes: int) -> int:
        """How many data-parallel ranks ``processes`` make.

        Raises:
            UserError: the degrees do not multiply to ``processes``, or ``data.rows`` cannot be
                divided among the ranks.
        """
        tensor, replicate, shard = (
            self.parallel.tensor,
            self.parallel.replicate,
            self.parallel.shard,
        )
        left = processes // (tensor * replicate)
        wanted = tensor * replicate * (left if shard == -1 else shard)
        if left < 1 or wanted != processes:
            raise UserError(
                f"{processes} process{'es' if processes > 1 else ''} cannot be shared as "
                f"parallel.tensor = {tensor} x parallel.replicate = {replicate} x "
                f"parallel.shard = {shard}; start a number of processes that fits, or --set them"
            )
        ranks = processes // tensor
        local = self.data.local_rows or 1
        if self.data.rows % (ranks * local):
            raise UserError(
                f"data.rows = {self.data.rows} is no multiple of data-parallel ranks x "
                f"data.local_rows = {ranks} x {local} = {ranks * local}"
            )
        return ranks

    def local_rows(self, processes: int) -> int:
        """Rows of one forward pass on one process."""
        return self.data.local_rows or self.data.rows // self.data_ranks(processes)


def load_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of the project called ``name``, or the .toml file of that path.

    Args:
        settings: ``section.key=value`` over what the recipe says.
    """
    config.check_command(name, "train")
    return config.load(Recipe, name, settings)
