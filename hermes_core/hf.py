"""The library behind Hugging Face transformers."""

from __future__ import annotations

from hermes_core.hf_attention import register
from hermes_core.hf_loss import compute_loss_func

__all__ = ["compute_loss_func", "register"]
