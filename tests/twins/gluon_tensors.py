"""Values in registers for `gluon_simulator`: tensors, pairs of float32, and a little PTX, on NumPy.

Casts round as hardware does, arithmetic on 16-bit floats is refused, layouts are nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twins.gluon_machine import DType, Fault

TYPES = {
    "float32": DType("float32", np.float32),
    "float16": DType("float16", np.float16),
    "bfloat16": DType("bfloat16", np.uint16),
    "int32": DType("int32", np.int32),
    "int64": DType("int64", np.int64),
    "uint32": DType("uint32", np.uint32),
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

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)

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
    like = next((x.dtype for x in operands if isinstance(x, Tensor)), I32)
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
