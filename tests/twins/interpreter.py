"""Triton's interpreter made honest about bfloat16 and assertions; measured on 3.6.0 and 3.7.1.

It keeps bf16 as bit patterns in uint16: arithmetic on them gives garbage without a word, and a
cast from float32 cuts off where a GPU rounds to the nearest even. Here the casts and `tl.dot`
are exact, and any other arithmetic on bf16 is a TypeError: kernels go to float32 first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Builder: Any = interpreter.InterpreterBuilder
Handle: Any = interpreter.TensorHandle


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(value: Any) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def widen(value: Any) -> Any:
    return Handle(from_bits(value.data), tl.float32) if is_bf16(value) else value


def make_honest() -> None:
    """Change the interpreter of this process, once."""
    if Builder.create_dot.__name__ == "honest_dot":
        return
    plain_cast, plain_convert = Builder.cast_impl, Builder.create_fp_to_fp

    def honest_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        # In float64: in float32 the bits would follow from where in a tile a row stands.
        product = np.matmul(widen(a).data, widen(b).data, dtype=np.float64)
        return Handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def cast(self: Any, source: Any, target: Any) -> Any:
        source = widen(source)
        if target.scalar == tl.bfloat16:
            return Handle(to_bits(source.data.astype(np.float32)), tl.bfloat16)
        same = source.dtype.scalar == target.scalar
        return source if same else plain_cast(self, source, target)

    def convert(self: Any, source: Any, target: Any, mode: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return plain_convert(self, source, target, mode)

    Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp = honest_dot, cast, convert
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(Builder, name, refusing_bf16(name))
    # device_assert is silent otherwise.
    object.__setattr__(interpreter.interpreter_builder.options, "debug", True)


def refusing_bf16(name: str) -> Any:
    plain = getattr(Builder, name)

    def operation(self: Any, *args: Any) -> Any:
        selects = name == "ternary_op" and args[-1] is np.where
        if not selects and any(map(is_bf16, args)):
            raise TypeError("arithmetic on bfloat16: go to float32 first")
        return plain(self, *args)

    return operation
