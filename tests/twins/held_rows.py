"""`hermes_kernels.cross_entropy_held` run by `gluon_simulator`: its own source, rows in shared
memory that copies fill when they please.

Shapes: C rows of the chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twins.gluon_machine import DType, Event, Fault, Machine, joined
from twins.gluon_simulator import Language, Pointer, View, run
from twins.gluon_tensors import F32, I32, TYPES
from twins.gluon_tensors import Tensor as Scalar
from twins.simulated import Sources, sources_of

SOURCES = sources_of("cross_entropy_held")
THREADS, WIDE = 4, 8


@dataclass(frozen=True)
class Logits(Pointer):
    """16-bit logits, decoded."""

    kind: DType = F32

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.kind)


class Copies(Language):
    """What `gl` and its Ampere module are for one program: copies in groups, stores in place."""

    def __init__(self, machine: Machine, *program: Any) -> None:
        super().__init__(machine, *program)
        self.open: list[Event] = []
        self.groups: list[list[Event]] = []
        self.stored: dict[int, NDArray[np.int64]] = {}  # by vector, how often each element was

    def namespaces(self) -> dict[str, Any]:
        known = super().namespaces()
        gluon = known["triton.experimental.gluon"]

        def jit(function: Any = None, **options: Any) -> Any:
            return self.kernel if options else function  # the kernel alone has options

        gluon.jit = jit
        copies = SimpleNamespace(
            async_copy_global_to_shared=self.copy, commit_group=self.commit, wait_group=self.wait
        )
        return known | {
            "triton.experimental.gluon.language.nvidia.ampere": SimpleNamespace(async_copy=copies)
        }

    def kernel(self, function: Callable[..., None]) -> Callable[..., None]:
        """As the one role of a machine."""

        def whole(**arguments: Any) -> None:
            def rows() -> None:
                function(**arguments)

            self.machine.specialize([(rows, ())])

        return whole

    def copy(self, view: View, pointer: Pointer) -> None:
        role = self.machine.current
        role.tick()
        places = pointer.places()
        event, name = self.machine.copy(lambda _: view.put(pointer.values[places]))
        view.touch(event.clock, name, writes=True)
        self.open.append(event)
        self.machine.pause()

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, outstanding: int) -> None:
        done = self.groups[: max(len(self.groups) - outstanding, 0)]
        events = [event for group in done for event in group]
        self.machine.pause(lambda: all(event.happened for event in events), "its copies")
        role = self.machine.current
        role.clock = joined(role.clock, *(event.clock for event in events))

    def store(self, pointer: Pointer, value: Any, mask: Scalar | None = None) -> None:
        kept = np.ones(value.shape, np.bool_) if mask is None else mask.data
        offset = pointer.offset.data if isinstance(pointer.offset, Scalar) else pointer.offset
        inside = np.broadcast_to(offset, kept.shape)[kept]
        places = Pointer(pointer.values, inside).places()
        counts = self.stored.setdefault(id(pointer.values), np.zeros(len(pointer.values), np.int64))
        counts[places] += 1
        if counts.max() > 1:
            raise Fault("an element is stored twice")
        pointer.values[places] = value.data[kept]


def loss_and_gradient_(
    logits_CV: Tensor, column_C: Tensor, weight_C: Tensor, z_loss: float, softcap: float, *,
    held: int, ahead: int = 2, seed: int = 0, sources: Sources = SOURCES,
) -> Tensor:  # fmt: skip
    """As the function of this name, with so many blocks of `THREADS` * `WIDE` columns in shared
    memory, copied so many blocks ahead."""
    rows, size = logits_CV.shape
    kind = TYPES[str(logits_CV.dtype).removeprefix("torch.")]
    values = logits_CV.float().flatten().numpy().copy()
    lse, target = (np.full(rows, np.nan, np.float32) for _ in range(2))
    arguments = {
        "logits": Logits(values, 0, kind),
        "columns": Pointer(column_C.numpy()),
        "weights": Pointer(weight_C.numpy()),
        "lse_out": Pointer(lse),
        "target_out": Pointer(target),
        "size": Scalar(np.asarray(size, np.int32), I32),
        "stride": Scalar(np.asarray(size, np.int32), I32),
        "z_loss": Scalar(np.asarray(z_loss, np.float32), F32),
        "SOFTCAP": softcap,
        "HELD": held,
        "AHEAD": ahead,
        "THREADS": THREADS,
    }
    run(sources, "held_kernel", arguments, (rows,), seed, Copies)
    logits_CV.copy_(torch.from_numpy(values).view(rows, size))
    return torch.from_numpy(np.stack([lse, target]))
