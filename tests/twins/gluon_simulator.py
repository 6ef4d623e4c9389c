"""A Gluon kernel's own source, run on NumPy: `run(sources, "kernel", arguments, grid, seed)`.

Its imports of Triton are answered with what stands here, so `gl.exp2` is NumPy's and a barrier one
of `gluon_machine`. Products are float64, rounded once: in float32 their bits would follow from the
place of a row in its tile. What follows from layouts is not seen.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twins.gluon_machine import Area, Barrier, Clock, DType, Fault, Machine, Memory
from twins.gluon_tensors import (
    F32,
    I1,
    I32,
    TYPES,
    Pairs,
    Tensor,
    assembled,
    fused,
    number,
    reckon,
    type_of,
)


@dataclass(frozen=True)
class Pointer:
    """Global memory from ``offset`` on."""

    values: NDArray[Any]
    offset: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.values, more + self.offset)

    def __sub__(self, less: Any) -> Pointer:
        return self + -less

    def places(self) -> NDArray[np.int64]:
        at = np.asarray(self.offset.data if isinstance(self.offset, Tensor) else self.offset)
        if at.size and not 0 <= at.min() <= at.max() < len(self.values):
            raise Fault(f"address {at.min()} to {at.max()} of {len(self.values)} elements")
        return at


@dataclass(frozen=True)
class Box:
    """A tensor descriptor: boxes of a vector or a [rows, columns] array; zeros beyond it."""

    values: NDArray[np.float32]
    block_shape: list[int]
    dtype: DType
    written: NDArray[np.int64] | None = None  # how often each element was stored
    layout: object = None

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(nbytes=math.prod(self.block_shape) * self.dtype.size_bytes)

    def part(self, at: Sequence[Any]) -> tuple[slice, ...]:
        corner = [int(operator.index(x)) for x in at]
        if corner[-1] * self.dtype.size_bytes % 16:
            raise Fault(f"a box at column {corner[-1]} is not aligned to 16 bytes")
        return tuple(slice(a, a + n) for a, n in zip(corner, self.block_shape, strict=True))


@dataclass(frozen=True)
class View:
    """A part of an allocation, as `gl` describes it."""

    memory: Memory
    area: Area
    shape: list[int]
    dtype: DType
    turned: bool = False
    rows: tuple[int, int] | None = None  # of what lies there; accesses are noted for all
    layout: object = None

    def index(self, slot: Any) -> View:
        at = int(operator.index(slot))
        if not 0 <= at < self.shape[0]:
            raise Fault(f"slot {at} of {self.shape[0]}")
        area = (at, at + 1, *self.area[2:])
        return View(self.memory, area, self.shape[1:], self.dtype)

    def slice(self, start: int, length: int, dim: int | None = None) -> View:
        """Columns of tensor memory or of a vector, else what ``dim`` says, rows if nothing."""
        if self.turned or len(self.shape) > 2:
            raise Fault("the simulator slices vectors, and matrices as they lie")
        if not (dim or self.memory.space == "tensor" or len(self.shape) == 1):
            return replace(self, rows=(start, start + length), shape=[length, self.shape[1]])
        size = self.dtype.size_bytes
        left = self.area[2] + start * size
        area = (*self.area[:2], left, left + length * size)
        return View(self.memory, area, [*self.shape[:-1], length], self.dtype)

    def permute(self, order: Sequence[int]) -> View:
        return View(self.memory, self.area, self.shape[::-1], self.dtype, not self.turned)

    def _reinterpret(self, dtype: DType, shape: Sequence[int], layout: object) -> View:
        return View(self.memory, self.area, list(shape), dtype)

    @property
    def values(self) -> NDArray[Any]:
        """As they are in memory now."""
        part = self.stored[slice(*self.rows)] if self.rows else self.stored
        return self.dtype.decode(part).reshape(self.straight)

    @property
    def straight(self) -> list[int]:
        return self.shape[::-1] if self.turned else self.shape

    @property
    def stored(self) -> NDArray[Any]:
        low, _, left, right = self.area
        part = np.ascontiguousarray(self.memory.bytes[low, :, left:right])
        return part.view(self.dtype.storage)

    def put(self, values: NDArray[Any]) -> None:
        low, _, left, right = self.area
        lines = self.memory.bytes[low, :, left:right]
        lines[...] = self.dtype.encode(values).view(np.uint8).reshape(lines.shape)

    def touch(self, clock: Clock, who: str, *, writes: bool) -> None:
        self.memory.touch(self.area, clock, who, writes=writes)

    def load(self, layout: object) -> Tensor:
        role = self.memory.machine.current
        role.tick()
        self.touch(role.clock, role.name, writes=False)
        loaded = Tensor(self.values.copy(), self.dtype)
        self.memory.machine.pause()
        return loaded

    def store(self, value: Tensor) -> None:
        if value.dtype != self.dtype or value.shape != self.shape:
            raise Fault(f"{value.dtype.name} {value.shape} into {self.dtype.name} {self.shape}")
        role = self.memory.machine.current
        role.tick()
        self.touch(role.clock, role.name, writes=True)
        self.put(value.data)
        self.memory.machine.pause()


def load(pointer: Pointer, mask: Tensor | None = None, other: Any = 0) -> Tensor:
    """What lies there; ``other``, and no access, where ``mask`` is false."""
    if mask is None:
        return Tensor(pointer.values[pointer.places()], type_of(pointer.values))
    kept = mask.data
    otherwise = other.data if isinstance(other, Tensor) else other
    loaded = np.full(kept.shape, otherwise, pointer.values.dtype)
    loaded[kept] = pointer.values[Pointer(pointer.values, pointer.offset[kept]).places()]
    return Tensor(loaded, type_of(pointer.values))


def insist(condition: object, message: str) -> None:
    if not condition:
        raise Fault(message)


class Language:
    """What `gl` and its Blackwell module are for one program."""

    def __init__(self, machine: Machine, program: Sequence[int], grid: Sequence[int]) -> None:
        self.machine, self.program, self.grid = machine, program, grid
        self.allocations = 0  # of barriers
        self.barriers: list[Barrier] = []

    def allocate(self, kind: DType, shape: Sequence[int], layout: object, space: str) -> Any:
        if layout == "barrier":
            self.allocations += 1
            name = f"barriers {self.allocations}"
            made = [Barrier(self.machine, f"{name}[{i}]") for i in range(shape[0])]
            self.barriers += made
            return SimpleNamespace(index=lambda i: made[operator.index(i)], shape=shape)
        memory = Memory(self.machine, tuple(shape), kind, space)
        slots, _, width = memory.bytes.shape
        return View(memory, (0, slots, 0, width), list(shape), kind)

    def namespaces(self) -> dict[str, Any]:
        """The stand-ins by the name of the module that has them."""
        m = self.machine
        gl = SimpleNamespace(
            **TYPES,
            constexpr=lambda x: x,
            static_range=range,
            static_assert=insist,
            warp_specialize=lambda parts, warps, registers: m.specialize(parts),
            program_id=lambda axis: Tensor(np.asarray(self.program[axis], np.int32), I32),
            num_programs=lambda axis: Tensor(np.asarray(self.grid[axis], np.int32), I32),
            allocate_shared_memory=lambda d, s, layout: self.allocate(d, s, layout, "shared"),
            SwizzledSharedLayout=lambda *_, **__: None,
            SliceLayout=lambda *_: None,
            BlockedLayout=lambda *_: None,
            arange=lambda a, b, layout=None: Tensor(np.arange(a, b, dtype=np.int32), I32),
            full=lambda s, v, d, layout=None: Tensor(np.full(s, number(v, d), d.storage), d),
            load=load,
            store=self.store,
            to_tensor=lambda x: Tensor(np.asarray(x, F32.storage), F32),
            convert_layout=lambda x, layout: x,
            inline_asm_elementwise=assembled,
            where=lambda c, a, b: reckon(lambda x, y: np.where(number(c, I1), x, y), a, b),
            maximum=lambda a, b, propagate_nan=False: reckon(
                np.maximum if propagate_nan else np.fmax, a, b
            ),
            minimum=lambda a, b: reckon(np.fmin, a, b),
            cdiv=lambda a, b: (a + (b - 1)) // b,
            max=lambda x, axis: reckon(lambda v: np.fmax.reduce(v, axis), x),
            min=lambda x, axis: reckon(lambda v: np.fmin.reduce(v, axis), x),
            sum=lambda x, axis: reckon(lambda v: v.sum(axis, dtype=v.dtype), x),
            exp2=lambda x: reckon(np.exp2, x),
            log2=lambda x: reckon(np.log2, x),
        )
        blackwell = SimpleNamespace(
            TensorMemoryLayout=lambda *_, **__: None,
            allocate_tensor_memory=lambda d, s, layout: self.allocate(d, s, layout, "tensor"),
            get_tmem_reg_layout=lambda *_: None,
            fence_async_shared=m.fence,
            tcgen05_mma=self.multiply,
            float2=SimpleNamespace(
                pack=lambda x, axis: Pairs(number(x, F32)),
                unpack=lambda p, axis: Tensor(p.data, F32),
                unpack2=lambda p: tuple(Tensor(p.data[..., i], F32) for i in (0, 1)),
                full_like=lambda p, v: Pairs(np.full_like(p.data, number(v, F32))),
                fma=fused,
            ),
            mbarrier=SimpleNamespace(
                MBarrierLayout=lambda: "barrier",
                init=lambda barrier, count: barrier.start(count),
                arrive=self.arrive,
                expect=self.expect,
                wait=lambda barrier, phase, pred=True: (
                    barrier.wait(operator.index(phase)) if pred else None
                ),
            ),
            tma=SimpleNamespace(
                async_copy_global_to_shared=self.fetch,
                async_copy_shared_to_global=self.send,
                store_wait=self.await_stores,
            ),
        )
        gluon = SimpleNamespace(
            jit=lambda function: function, constexpr_function=lambda function: function, language=gl
        )
        propagate = SimpleNamespace(ALL=True, NONE=False)
        triton = SimpleNamespace(
            jit=gluon.jit, language=SimpleNamespace(**vars(gl), PropagateNan=propagate)
        )
        return {
            "triton": triton,
            "triton.experimental": SimpleNamespace(gluon=gluon),
            "triton.experimental.gluon.nvidia.blackwell": SimpleNamespace(TensorDescriptor=None),
            "triton.experimental.gluon": gluon,
            "triton.experimental.gluon.language.nvidia.blackwell": blackwell,
        }

    def end(self) -> None:
        """Check what a program leaves behind."""

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        kept = mask.data
        pointer = Pointer(pointer.values, pointer.offset[kept])
        places, value = pointer.places(), value[kept]
        if not np.isnan(pointer.values[places]).all():
            raise Fault("an element of the output is stored twice")
        pointer.values[places] = value.data

    def arrive(self, barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        if not pred:
            return
        self.machine.current.tick()
        barrier.arrive(self.machine.current.clock, count)
        self.machine.pause()

    def expect(self, barrier: Barrier, bytes: int) -> None:
        self.machine.current.tick()
        barrier.arrive(self.machine.current.clock, 1, bytes)
        self.machine.pause()

    def multiply(
        self, a: View, b: View, acc: View, *, use_acc: bool, mbarriers: Sequence[Barrier] = ()
    ) -> None:
        self.machine.current.tick()

        def happen(clock: Clock) -> None:
            left = a.values
            right = b.values.T if b.turned else b.values
            with np.errstate(all="ignore"):
                product = np.matmul(left, right, dtype=np.float64).astype(np.float32)
                acc.put(product + acc.values if use_acc else product)

        clock = self.machine.product(happen)
        for view in (a, b, *([acc] if use_acc else [])):
            view.touch(clock, "tensor", writes=False)
        acc.touch(clock, "tensor", writes=True)
        for barrier in mbarriers:
            self.machine.product(lambda clock, barrier=barrier: barrier.arrive(clock))
        self.machine.pause()

    def fetch(self, box: Box, at: Sequence[Any], barrier: Barrier, view: View) -> None:
        place = box.part(at)
        self.machine.current.tick()

        def happen(clock: Clock) -> None:
            whole = np.zeros(box.block_shape, np.float32)
            part = box.values[place]
            whole[tuple(slice(n) for n in part.shape)] = part
            view.put(whole)
            barrier.gather(clock, box.block_type.nbytes)

        event, name = self.machine.copy(happen)
        view.touch(event.clock, name, writes=True)
        self.machine.pause()

    def send(self, box: Box, at: Sequence[Any], view: View) -> None:
        place = box.part(at)
        role = self.machine.current
        role.tick()

        def happen(clock: Clock) -> None:
            part = box.values[place]
            part[...] = view.values[tuple(slice(n) for n in part.shape)]
            assert box.written is not None
            box.written[place] += 1

        event, name = self.machine.copy(happen)
        view.touch(event.clock, name, writes=False)
        role.stores.append(event)
        self.machine.pause()

    def await_stores(self, pendings: int) -> None:
        role = self.machine.current
        waited = role.stores[: len(role.stores) - pendings]
        self.machine.pause(lambda: all(event.happened for event in waited), "its stores")
        for event in waited:
            role.stores.remove(event)
            role.clock = {**role.clock, **{k: v for k, v in event.clock.items() if "copy" in k}}


def run(
    sources: Mapping[str, str], kernel: str, arguments: Mapping[str, Any], grid: Sequence[int],
    seed: int, language: type[Language] = Language,
) -> None:  # fmt: skip
    """Run each program of ``grid`` of the kernel so named.

    Args:
        sources: the text of each module by its name; the last has the kernel, and may import from
            those before.
        seed: of the order in which roles, copies and products go on.
        language: that of the GPU, Blackwell's or `twins.hopper.Hopper`.

    Raises:
        Fault: a race, a deadlock, a barrier or memory misused; the message says which.
    """
    codes = {name: compile(text, name, "exec") for name, text in sources.items()}
    for i, place in enumerate(np.ndindex(*grid)):
        program = language(Machine(seed + 7919 * i), place, grid)
        known = program.namespaces()

        def bring(name: str, *rest: Any, known: dict[str, Any] = known) -> Any:
            return known.get(name) or builtins.__import__(name, *rest)

        for name, code in codes.items():
            space = {"__builtins__": {**vars(builtins), "__import__": bring}, "__name__": name}
            exec(code, space)
            known[name] = SimpleNamespace(**space)
        getattr(known[name], kernel)(**arguments)
        program.end()
