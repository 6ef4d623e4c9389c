"""Triton's CPU interpreter, made honest about bfloat16.

It keeps bf16 as bit patterns in uint16: on Triton 3.6 and 3.7 a sum, a product or `tl.dot` of them
is garbage without an error, and a cast from float32 cuts off where a GPU rounds to nearest even.
Here `tl.dot` and the casts are exact, and every other operation on bf16 raises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return Handle(to_float32(handle.data), tl.float32)


def cure() -> None:
    """Change the interpreter of this process; a second call changes nothing."""
    if getattr(Builder, "is_cured", False):
        return
    dot, cast, convert = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp

    def exact_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)

    def exact_cast(self: Any, source: Any, target: Any) -> Any:
        source = widen(source)
        if target.scalar == tl.bfloat16:
            return Handle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        return source if source.dtype.scalar == target.scalar else cast(self, source, target)

    def exact_convert(self: Any, source: Any, target: Any, mode: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return exact_cast(self, source, target)
        return convert(self, source, target, mode)

    Builder.create_dot, Builder.cast_impl = exact_dot, exact_cast
    Builder.create_fp_to_fp = exact_convert
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(Builder, name, _refusing(getattr(Builder, name), selects=name == "ternary_op"))
    object.__setattr__(interpreter.interpreter_builder.options, "debug", True)  # device_assert
    Builder.is_cured = True


def _refusing(operation: Any, *, selects: bool) -> Any:
    def checked(self: Any, *args: Any) -> Any:
        moves_bits = selects and args[-1] is np.where
        for x in args:
            if isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16 and not moves_bits:
                raise TypeError("bf16 arithmetic in a kernel: go to float32 first")
        return operation(self, *args)

    return checked
