"""The masked loss for Hugging Face transformers' Trainer, which then never builds the logits.

Shapes: B rows, L row length, T = B x L, D model size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hermes_core.loss import Loss, linear_cross_entropy, masked_cross_entropy
from hermes_core.samples import IGNORE_INDEX

# What some models do to their logits after the head; the loss would not know of it.
TRANSFORMS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}

LossFunction = Callable[..., Tensor]


class WaitingHead(nn.Linear):
    """An output head that lets hidden states through while training, for the loss to project."""

    def __init__(self, head: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight = head.weight  # the same parameter: ties and names stay
        self.register_parameter("bias", None)
        self.train(head.training)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if self.training else super().forward(hidden)


def compute_loss_func(model: Any, **options: Any) -> LossFunction:
    """Prepare a causal language model, and give what Trainer takes as ``compute_loss_func``.

    While training, the model's output head is left out and the loss computes logits at kept
    tokens alone. Divided by ``num_items_in_batch``, the result is the same for any number of
    accumulation steps. In evaluation the model gives its logits as ever.

    Args:
        model: its output head must be a linear layer without bias and the last thing done to
            the logits.
        options: of `linear_cross_entropy`: z_loss, chunk_bytes, backend.

    Raises:
        ValueError: the model does something else to its logits.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"the model's output head is {head}; want a linear layer without bias")
    text_config = model.config.get_text_config()
    for name, plain in TRANSFORMS.items():
        value = getattr(text_config, name, plain)
        if value not in (plain, None):
            raise ValueError(f"the model's {name} is {value}, which the loss would leave out")
    waiting = WaitingHead(head)
    model.set_output_embeddings(waiting)

    def loss_of(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        found = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        next_T = next_labels(labels).flatten()
        denominator: Tensor | int
        if num_items_in_batch is None:
            denominator = (next_T != IGNORE_INDEX).sum().clamp(min=1)
        elif isinstance(num_items_in_batch, Tensor):
            denominator = num_items_in_batch.clamp(min=1).to(labels.device)
        else:
            denominator = max(num_items_in_batch, 1)
        return _loss(found, waiting, next_T, denominator, options).total

    return loss_of


def next_labels(labels_BL: Tensor) -> Tensor:
    """The next token's label at each position, as transformers' models shift them."""
    return nn.functional.pad(labels_BL[:, 1:], (0, 1), value=IGNORE_INDEX)


def _loss(
    found: Tensor, head: WaitingHead, next_T: Tensor, denominator: Tensor | int,
    options: dict[str, Any],
) -> Loss:  # fmt: skip
    if not head.training:
        return masked_cross_entropy(
            found.flatten(0, -2), next_T, denominator=denominator,
            vocab_size=head.out_features, **options,
        )  # fmt: skip
    if found.shape[-1] != head.in_features:
        raise ValueError(
            f"the model gave {tuple(found.shape)} where hidden states of size {head.in_features} "
            "were wanted; its output head was replaced after compute_loss_func(model)"
        )
    # Mixed precision: as a linear layer would, in the type that autocast asks for.
    kind = found.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    return linear_cross_entropy(
        found.flatten(0, -2).to(cast), head.weight.to(cast), next_T, denominator=denominator,
        vocab_size=head.out_features, **options,
    )  # fmt: skip
