"""The last projection as a module that gives the loss instead of logits.

Shapes: T packed tokens, D model size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from hermes_core.loss import Loss, linear_cross_entropy


class LossHead(nn.Linear):
    """A linear layer [V, D] without bias, called with hidden states and labels.

    The weight is read inside `forward`, so that FSDP2's hooks gather it before and scatter its
    gradient afterwards; tensor parallelism over the vocabulary is recognised by the weight's
    placement. Call it inside the forward of the module that FSDP2 wraps, or wrap it by itself: a
    weight that FSDP2 has scattered is refused outside. Where a rank's share is a plain tensor
    (torchtitan's spmd_types), pass `group`: without it the shares do not add up to `out_features`,
    which raises.
    """

    def __init__(self, in_features: int, out_features: int, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **factory)

    def forward(self, hidden: Tensor, labels: Tensor, **options: Any) -> Loss:  # type: ignore[override]
        """The loss of hidden [..., D] and labels [...]; ``options`` of `linear_cross_entropy`.

        Raises:
            ValueError: labels have another shape than hidden has before its last dimension; the
                weight or hidden states are placed otherwise than is described above.
        """
        if hidden.ndim < 2:
            raise ValueError(f"hidden must be [..., tokens, D], got {tuple(hidden.shape)}")
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels is {tuple(labels.shape)} but hidden is {tuple(hidden.shape)}; want labels "
                f"{tuple(hidden.shape[:-1])}"
            )
        weight_VD, group = local_share(self.weight, options.pop("group", None))
        hidden_TD = local_hidden(hidden, sharded=group is not None).flatten(0, -2)
        return linear_cross_entropy(
            hidden_TD, weight_VD.to(hidden_TD.dtype), labels.flatten(), group=group,
            vocab_size=self.out_features, **options,
        )  # fmt: skip


def local_share(
    weight: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.ProcessGroup | None]:
    """This rank's share of a head's weight, and the group that shares the vocabulary.

    Raises:
        ValueError: the weight is sharded in some other way than over its rows, or by FSDP2, whose
            ranks have unlike tokens.
    """
    if not isinstance(weight, DTensor):
        return weight, group
    mesh = weight.device_mesh
    if mesh.size() == 1 or all(isinstance(p, Replicate) for p in weight.placements):
        return weight.to_local(), None
    if weight.placements != (Shard(0),):
        raise ValueError(f"weight is placed as {weight.placements}; want (Shard(0),), by its rows")
    if not torch.compiler.is_compiling() and _is_scattered(weight):
        raise ValueError(
            "weight is scattered by FSDP2, whose ranks have unlike tokens: call the head inside "
            "the forward of the module that fully_shard wraps, or wrap the head by itself"
        )
    return weight.to_local(), mesh.get_group()


def _is_scattered(weight: Tensor) -> bool:
    """Whether FSDP2 holds this very parameter: it looks like tensor parallelism over rows.

    A tensor-parallel weight under FSDP2 is another tensor here: gathered, or placed twice.
    """
    for reference in list(_module_state_mapping.values()):
        state = reference()
        if not isinstance(state, FSDPState):
            continue
        # Some versions have one group, later ones several.
        one = () if hasattr(state, "_fsdp_param_groups") else (state._fsdp_param_group,)
        for group in getattr(state, "_fsdp_param_groups", one):
            if group and any(held.sharded_param is weight for held in group.fsdp_params):
                return True
    return False


def local_hidden(hidden: Tensor, *, sharded: bool) -> Tensor:
    """Hidden states as a plain tensor, whose gradient is partial where the head is sharded.

    Raises:
        ValueError: they are not whole on every rank.
    """
    if not isinstance(hidden, DTensor):
        return hidden
    if not all(isinstance(placement, Replicate) for placement in hidden.placements):
        raise ValueError(f"hidden is placed as {hidden.placements}; want it whole on every rank")
    return hidden.to_local(grad_placements=[Partial()] if sharded else None)
