"""Triton's interpreter, where it runs the kernels, is told to be honest first."""

from __future__ import annotations

from twins.interpreter import make_honest

make_honest()
