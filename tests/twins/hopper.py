"""What Hopper's Gluon kernels use beyond Blackwell's, for `gluon_simulator`: products of a group of
warps, `run(..., language=Hopper)`.

A product is asked for, and its result stands in registers that may be read once the group has
waited. Until then it reads its operands in shared memory, which nobody may overwrite. Products of a
group end in order, those of two groups in any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twins.gluon_machine import Clock, Event, Fault, Machine
from twins.gluon_simulator import Language, View
from twins.gluon_tensors import F32, DType, Tensor


@dataclass(eq=False)
class Product:
    """One that a group asked for, the ``time``-th of its own."""

    time: int
    event: Event
    result: NDArray[np.float32] | None = None


class Promise(Tensor):
    """The result of a product that its group has not waited for."""

    def __init__(self, product: Product, shape: Sequence[int]) -> None:
        self.product, self.promised, self.dtype = product, list(shape), F32

    @property
    def shape(self) -> list[int]:
        return self.promised

    @property
    def data(self) -> NDArray[Any]:  # type: ignore[override]
        raise Fault("a result is read whose product may still write it")


class Hopper(Language):
    """What `gl` and its Hopper module are for one program."""

    def __init__(self, machine: Machine, program: Sequence[int], grid: Sequence[int]) -> None:
        super().__init__(machine, program, grid)
        self.asked: dict[str, list[Product]] = {}  # by group, those it has not waited for
        self.times: dict[str, int] = {}

    def namespaces(self) -> dict[str, Any]:
        known = super().namespaces()
        known["triton.experimental.gluon"].language.__dict__.update(
            inline_asm_elementwise=pinned,
            NVMMADistributedLayout=lambda *_: None,
            DotOperandLayout=lambda *_: None,
            store=lambda pointer, value: self.store(
                pointer, value, Tensor(np.ones(value.shape, np.bool_), value.dtype)
            ),
        )
        blackwell = known["triton.experimental.gluon.language.nvidia.blackwell"]
        return known | {
            "triton.experimental.gluon.language.nvidia.hopper": SimpleNamespace(
                fence_async_shared=blackwell.fence_async_shared,
                mbarrier=blackwell.mbarrier,
                tma=blackwell.tma,
                warpgroup_mma=self.ask,
                warpgroup_mma_wait=self.await_products,
            ),
            "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=None),
        }

    def end(self) -> None:
        """A program takes any number of tiles: after each it could take one more."""
        for barrier in self.barriers:
            barrier.end()

    def ask(
        self, a: View | Tensor, b: View, acc: Tensor, *, use_acc: bool = True, is_async: bool
    ) -> Promise:
        """a @ b, more ``acc`` if it is used."""
        role = self.machine.current
        role.tick()
        shape = [a.shape[0], b.shape[1]]
        if a.shape[1] != b.shape[0] or acc.shape != shape or a.dtype != b.dtype or not is_async:
            raise Fault(f"{a.dtype.name} {a.shape} @ {b.dtype.name} {b.shape} into {acc.shape}")
        held = None if isinstance(a, View) else a.data  # registers: as they are now
        before = acc.product if isinstance(acc, Promise) else None
        added = acc.data if use_acc and before is None else None
        waiting = self.asked.setdefault(role.name, [])

        def happen() -> None:
            left = a.values if isinstance(a, View) else held
            with np.errstate(all="ignore"):
                # In float64: in float32 the bits would follow from where in a tile a row stands.
                right = b.values.T if b.turned else b.values
                result = (left.astype(np.float64) @ right).astype(np.float32)
                if use_acc:
                    result = result + (before.result if before else added)
            product.result = result

        time = self.times[role.name] = self.times.get(role.name, 0) + 1
        who = f"products of {role.name}"
        clock: Clock = {**role.clock, who: time}
        event = Event(happen, after=waiting[-1].event if waiting else None, clock=clock)
        product = Product(time, event)
        self.machine.events.append(event)
        for view in (a, b):
            if isinstance(view, View):
                view.touch(clock, who, writes=False)
        waiting.append(product)
        self.machine.pause()
        return Promise(product, shape)

    def await_products(self, outstanding: int, deps: Sequence[Tensor]) -> Any:
        """``deps`` once all but the last so many products have ended; what has not stays so."""
        role = self.machine.current
        waiting = self.asked.get(role.name, [])
        done = waiting[: max(len(waiting) - outstanding, 0)]
        self.machine.pause(lambda: all(one.event.happened for one in done), "its products")
        for one in done:
            waiting.remove(one)
            role.clock[f"products of {role.name}"] = one.time
        given = [self._given(one, waiting) for one in deps]
        return given[0] if len(given) == 1 else tuple(given)

    def _given(self, one: Tensor, waiting: Sequence[Product]) -> Tensor:
        if not isinstance(one, Promise) or one.product in waiting:
            return one
        assert one.product.result is not None
        return Tensor(one.product.result, F32)


def pinned(text: str, _: str, inputs: Sequence[Tensor], *, dtype: DType, **__: Any) -> Tensor:
    """Assembly that moves its one operand, and says only when it must be there."""
    if "mov." not in text or inputs[0].dtype != dtype:
        raise Fault("the simulator knows no assembly on Hopper but moves")
    return Tensor(inputs[0].data, dtype)
