"""A Gluon kernel's own source, run on NumPy: `Simulated(path).run(...)`.

Its imports of Triton are answered with what stands here, so `gl.exp2` is NumPy's and a barrier one
of `gluon_machine`. Casts round as hardware does, products are float32, layouts are ignored.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twins.gluon_machine import Area, Barrier, Clock, DType, Fault, Machine, Memory

TYPES = {
    "float32": DType("float32", np.float32),
    "float16": DType("float16", np.float16),
    "bfloat16": DType("bfloat16", np.uint16),
    "int32": DType("int32", np.int32),
    "int64": DType("int64", np.int64),
    "int1": DType("int1", np.bool_),
}
F32, I32, I64, I1 = (TYPES[name] for name in ("float32", "int32", "int64", "int1"))


def type_of(values: NDArray[Any]) -> DType:
    kinds = {"f": F32, "b": I1, "i": I64 if values.dtype.itemsize == 8 else I32}
    return kinds[values.dtype.kind]


@dataclass(eq=False)
class Tensor:
    """Values in registers; 16-bit ones as float32, to be cast before anything is reckoned."""

    data: NDArray[Any]
    dtype: DType

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def to(self, dtype: DType, bitcast: bool = False) -> Tensor:
        if bitcast:
            return Tensor(self.data.view(dtype.storage), dtype)
        return Tensor(dtype.rounded(self.data), dtype)

    def broadcast_to(self, *shape: int) -> Tensor:
        return Tensor(np.broadcast_to(self.data, shape), self.dtype)

    def __getitem__(self, key: Any) -> Tensor:
        return Tensor(self.data[key], self.dtype)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)


def number(x: Any, like: DType) -> NDArray[Any]:
    """An operand: a Python number takes the tensor's type."""
    if isinstance(x, Tensor):
        if x.dtype.name in ("float16", "bfloat16"):
            raise Fault(f"arithmetic on {x.dtype.name}: go to float32 first")
        return x.data
    return np.asarray(x, F32.storage if isinstance(x, float) else like.storage)


def reckon(operation: Callable[..., Any], *operands: Any) -> Tensor:
    like = next(x.dtype for x in operands if isinstance(x, Tensor))
    values = [number(x, like) for x in operands]
    if any(v.dtype.kind == "f" for v in values):
        values = [v.astype(np.float32) if v.dtype.kind == "i" else v for v in values]
    with np.errstate(all="ignore"):
        result = np.asarray(operation(*values))
    return Tensor(result, type_of(result))


def install_operators() -> None:
    names = (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor", "lshift", "rshift",
        "lt", "le", "gt", "ge", "eq", "ne",
    )  # fmt: skip
    for name in names:
        plain, bare = getattr(operator, name), name.strip("_")

        def ahead(self: Tensor, other: Any, plain: Any = plain) -> Tensor:
            return reckon(plain, self, other)

        def behind(self: Tensor, other: Any, plain: Any = plain) -> Tensor:
            return reckon(lambda a, b: plain(b, a), self, other)

        setattr(Tensor, f"__{bare}__", ahead)
        setattr(Tensor, f"__r{bare}__", behind)
    Tensor.__neg__ = lambda self: reckon(operator.neg, self)  # type: ignore[attr-defined]
    Tensor.__invert__ = lambda self: reckon(operator.invert, self)  # type: ignore[attr-defined]


install_operators()


@dataclass(frozen=True)
class Pairs:
    """Two float32 in one register: columns 2i and 2i + 1."""

    data: NDArray[np.float32]

    def __mul__(self, other: Pairs) -> Pairs:
        return Pairs(self.data * other.data)

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(self.data + other.data)

    def __sub__(self, other: Pairs) -> Pairs:
        return Pairs(self.data - other.data)

    def sum(self, axis: int) -> Pairs:
        halves = [self.data[:, i::2].sum(axis, dtype=np.float32) for i in (0, 1)]
        return Pairs(np.stack(halves, -1))


def fused(a: Pairs, b: Pairs, c: Pairs) -> Pairs:
    with np.errstate(all="ignore"):
        wide = a.data.astype(np.float64) * b.data + c.data
    return Pairs(wide.astype(np.float32))


PTX: dict[str, Callable[..., Any]] = {
    "and.b32": np.bitwise_and,
    "setp.ne.b32": np.not_equal,
    "selp.b32": lambda a, b, p: np.where(p, a, b),
}


def assembled(text: str, _: str, inputs: Sequence[Tensor], *, dtype: DType, **__: Any) -> Tensor:
    """Straight PTX on 32-bit registers: $0 is the result, the others the inputs."""
    values = {f"${i + 1}": x.data.view(np.uint32) for i, x in enumerate(inputs)}
    for statement in text.strip("{} \n").split(";"):
        name, _, operands = statement.strip().partition(" ")
        if name in PTX:
            target, *sources = operands.replace(" ", "").split(",")
            values[target] = PTX[name](
                *(values[x] if x in values else np.uint32(int(x, 0)) for x in sources)
            )
    return Tensor(values["$0"].view(dtype.storage), dtype)


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
    """A tensor descriptor: boxes of a [rows, columns] array; zeros beyond it."""

    values: NDArray[np.float32]
    block_shape: list[int]
    dtype: DType
    written: NDArray[np.int64] | None = None  # how often each element was stored
    layout: object = None

    @property
    def block_type(self) -> Any:
        rows, columns = self.block_shape
        return SimpleNamespace(nbytes=rows * columns * self.dtype.size_bytes)

    def part(self, at: Sequence[Any]) -> tuple[slice, slice]:
        row, column = (int(operator.index(x)) for x in at)
        if row % 1 or column * self.dtype.size_bytes % 16:
            raise Fault(f"a box at column {column} is not aligned to 16 bytes")
        return slice(row, row + self.block_shape[0]), slice(column, column + self.block_shape[1])


@dataclass(frozen=True)
class View:
    """A part of an allocation, as `gl` describes it."""

    memory: Memory
    area: Area
    shape: list[int]
    dtype: DType
    turned: bool = False
    layout: object = None

    def index(self, slot: Any) -> View:
        at = int(operator.index(slot))
        if not 0 <= at < self.shape[0]:
            raise Fault(f"slot {at} of {self.shape[0]}")
        area = (at, at + 1, *self.area[2:])
        return View(self.memory, area, self.shape[1:], self.dtype)

    def slice(self, start: int, length: int, dim: int = -1) -> View:
        if dim not in (-1, len(self.shape) - 1) or self.turned:
            raise Fault("the simulator slices columns only")
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
        return self.dtype.decode(self.stored).reshape(self.straight)

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


class Language:
    """What `gl` and its Blackwell module are for one program."""

    def __init__(self, machine: Machine, program: Sequence[int]) -> None:
        self.machine, self.program = machine, program
        self.barriers = 0

    def allocate(self, kind: DType, shape: Sequence[int], layout: object, space: str) -> Any:
        if layout == "barrier":
            self.barriers += 1
            name = f"barriers {self.barriers}"
            made = [Barrier(self.machine, f"{name}[{i}]") for i in range(shape[0])]
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
            warp_specialize=lambda parts, warps, registers: m.specialize(parts),
            program_id=lambda axis: Tensor(np.asarray(self.program[axis], np.int32), I32),
            allocate_shared_memory=lambda d, s, layout: self.allocate(d, s, layout, "shared"),
            SwizzledSharedLayout=lambda *_, **__: None,
            SliceLayout=lambda *_: None,
            arange=lambda a, b, layout=None: Tensor(np.arange(a, b, dtype=np.int32), I32),
            full=lambda s, v, d, layout=None: Tensor(np.full(s, v, d.storage), d),
            load=lambda p: Tensor(p.values[p.places()], type_of(p.values)),
            store=self.store,
            to_tensor=lambda x: Tensor(np.asarray(x, F32.storage), F32),
            convert_layout=lambda x, layout: x,
            inline_asm_elementwise=assembled,
            where=lambda c, a, b: reckon(np.where, c, a, b),
            maximum=lambda a, b, propagate_nan=False: reckon(
                np.maximum if propagate_nan else np.fmax, a, b
            ),
            minimum=lambda a, b: reckon(np.fmin, a, b),
            cdiv=lambda a, b: (a + (b - 1)) // b,
            max=lambda x, axis: reckon(lambda v: np.fmax.reduce(v, axis), x),
            min=lambda x, axis: reckon(lambda v: np.fmin.reduce(v, axis), x),
            sum=lambda x, axis: reckon(lambda v: v.sum(axis), x),
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
                wait=lambda barrier, phase: barrier.wait(operator.index(phase)),
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
        propagate = SimpleNamespace(PropagateNan=SimpleNamespace(ALL=True, NONE=False))
        return {
            "triton": SimpleNamespace(language=propagate),
            "triton.experimental": SimpleNamespace(gluon=gluon),
            "triton.experimental.gluon.nvidia.blackwell": SimpleNamespace(TensorDescriptor=None),
            "triton.experimental.gluon": gluon,
            "triton.experimental.gluon.language.nvidia.blackwell": blackwell,
        }

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        kept = mask.data
        pointer = Pointer(pointer.values, pointer.offset[kept])
        places, value = pointer.places(), value[kept]
        if not np.isnan(pointer.values[places]).all():
            raise Fault("an element of the output is stored twice")
        pointer.values[places] = value.data

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        self.machine.current.tick()
        barrier.arrive(self.machine.current.clock, count)
        self.machine.pause()

    def expect(self, barrier: Barrier, bytes: int) -> None:
        self.machine.current.tick()
        barrier.arrive(self.machine.current.clock, 1, bytes)
        self.machine.pause()

    def multiply(
        self, a: View, b: View, acc: View, *, use_acc: bool, mbarriers: Sequence[Barrier]
    ) -> None:
        self.machine.current.tick()

        def happen(clock: Clock) -> None:
            left = a.values
            right = b.values.T if b.turned else b.values
            with np.errstate(all="ignore"):
                product = left.astype(np.float32) @ right.astype(np.float32)
                acc.put(product + acc.values if use_acc else product)

        clock = self.machine.product(happen)
        for view in (a, b, *([acc] if use_acc else [])):
            view.touch(clock, "tensor", writes=False)
        acc.touch(clock, "tensor", writes=True)
        for barrier in mbarriers:
            self.machine.product(lambda clock, barrier=barrier: barrier.arrive(clock))
        self.machine.pause()

    def fetch(self, box: Box, at: Sequence[Any], barrier: Barrier, view: View) -> None:
        rows, columns = box.part(at)
        self.machine.current.tick()

        def happen(clock: Clock) -> None:
            whole = np.zeros(box.block_shape, np.float32)
            part = box.values[rows, columns]
            whole[: part.shape[0], : part.shape[1]] = part
            view.put(whole)
            barrier.gather(clock, box.block_type.nbytes)

        event, name = self.machine.copy(happen)
        view.touch(event.clock, name, writes=True)
        self.machine.pause()

    def send(self, box: Box, at: Sequence[Any], view: View) -> None:
        rows, columns = box.part(at)
        role = self.machine.current
        role.tick()

        def happen(clock: Clock) -> None:
            part = box.values[rows, columns]
            part[...] = view.values[: part.shape[0], : part.shape[1]]
            assert box.written is not None
            box.written[rows, columns] += 1

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
    source: str, kernel: str, arguments: Mapping[str, Any], grid: Sequence[int], seed: int
) -> None:
    """Run each program of ``grid`` of the kernel so named in ``source``, the text of a module.

    Raises:
        Fault: a race, a deadlock, a barrier or memory misused; the message says which.
    """
    code = compile(source, kernel, "exec")
    for i, place in enumerate(np.ndindex(*grid)):
        stands_in = Language(Machine(seed + 7919 * i), place).namespaces()

        def bring(name: str, *rest: Any, stands_in: dict[str, Any] = stands_in) -> Any:
            return stands_in.get(name) or builtins.__import__(name, *rest)

        space = {"__builtins__": {**vars(builtins), "__import__": bring}, "__name__": kernel}
        exec(code, space)
        space[kernel](**arguments)


def text(path: str | Path) -> str:
    return Path(path).read_text()
