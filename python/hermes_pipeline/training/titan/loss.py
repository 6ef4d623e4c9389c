"""The library's loss behind torchtitan's interface: logits at kept positions only.

Shapes: B rows, L row length, T = B x L, M kept tokens, D model size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size

from hermes_core.loss import linear_cross_entropy
from hermes_core.loss_head import local_hidden, local_share


class KeptTokenLoss(ChunkedLossWrapper):
    """Cross-entropy summed over kept tokens, divided by their number in the whole step.

    The trainer hands a ChunkedLossWrapper the output head and lets the model return hidden
    states; the chunks of the parent are not used.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        vocab_size: int  # the whole vocabulary, whatever is sharded

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        super().__init__(config, compile_config=compile_config)
        self.vocab_size = config.vocab_size

    def __call__(
        self,
        pred: Tensor,  # hidden states [B, L, D]; torchtitan's name
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        kept: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weight_VD, group = self._head()
        hidden_TD = local_hidden(pred, sharded=group is not None).flatten(0, 1)
        loss = linear_cross_entropy(
            hidden_TD,
            weight_VD.to(hidden_TD.dtype),
            labels.flatten(),
            denominator=None if global_valid_tokens is None else global_valid_tokens.clamp(min=1),
            kept=kept,
            group=group,
            vocab_size=self.vocab_size,
        )
        return loss.total, {}

    def _head(self) -> tuple[Tensor, dist.ProcessGroup | None]:
        """The output head's weight on this rank, and the group that shares its vocabulary."""
        head = self.lm_head
        assert head is not None, "the trainer sets the head before the first step"
        if isinstance(head, FSDPModule):
            head.unshard()  # a no-op where the norm beside it has done so
        weight = head.weight
        if not isinstance(weight, DTensor) and spmd_mesh_size("tp") > 1:
            # torchtitan's spmd_types backend keeps this rank's share as a plain tensor.
            mesh = current_spmd_mesh()
            assert mesh is not None
            return weight, mesh.get_group("tp")
        return local_share(weight, None)
