"""The library behind Hugging Face transformers."""

from __future__ import annotations

from hermes_core.hf_attention import register

__all__ = ["register"]
