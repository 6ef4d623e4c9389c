"""The masked loss for Hugging Face transformers' Trainer, which then never builds the logits.

Shapes: B rows, L row length, T = B x L, D model size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hermes_core.loss import linear_cross_entropy, masked_cross_entropy
from hermes_core.samples import IGNORE_INDEX

# What some models do to their logits after the head or add to their loss, as their configs name
# it, and where it does nothing. The loss would not know of it.
TRANSFORMS = {
    "final_logit_softcapping": None, "logits_soft_cap": None, "output_logit_soft_cap": None,
    "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0,
    "z_loss_coefficient": 0.0,
}  # fmt: skip

# The factor on the routers' loss: an attribute of most models, else of their config.
ROUTER_FACTORS = ("router_aux_loss_coef", "aux_loss_coef")

# Logits of the probe: a cap far above what a model starts with must show, and fp16 must hold them.
LARGEST = 1000

LossFunction = Callable[..., Tensor]


class Pass(NamedTuple):
    """What an output head did when it ran: let hidden states through, or gave logits."""

    weight_VD: Tensor | None  # None: it gave logits
    dtype: torch.dtype  # of the product
    vocabulary: int


class Note:
    """The last pass through a model's head, or through that of a copy: copies share it.

    So the loss takes the weight that belongs to the hidden states, whichever copy made them.
    """

    last: Pass | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Note:
        return self


class WaitingHead(nn.Module):
    """An output head that lets hidden states through while training, for the loss to project.

    No `nn.Linear`, so that PEFT refuses to add LoRA's logits to hidden states.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight = head.weight  # the same parameter: ties and names stay
        self.register_parameter("bias", None)
        self.note = Note()
        self.train(head.training)

    def extra_repr(self) -> str:  # PEFT's refusal shows it
        return f"{self.in_features}, {self.out_features}, from compute_loss_func: takes no adapter"

    def forward(self, hidden: Tensor) -> Tensor:
        weight_VD = self.weight if self.training else None
        # Autocast may be off where the loss is computed, as it is in Trainer.
        self.note.last = Pass(weight_VD, _product_dtype(hidden, self.weight), self.out_features)
        if weight_VD is None:
            return nn.functional.linear(hidden, self.weight)
        reached: Tensor = _Reach.apply(hidden, weight_VD)
        return reached


class _Reach(torch.autograd.Function):
    """Hidden states as they are, with the weight in their graph.

    DDP takes a parameter that it cannot reach from a model's outputs to be unused.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def compute_loss_func(model: Any, **options: Any) -> LossFunction:
    """Prepare a causal language model, and give what Trainer takes as ``compute_loss_func``.

    While training, the model's output head is left out and the loss computes logits at kept
    tokens alone. Divided by ``num_items_in_batch``, the result is the same for any number of
    accumulation steps. In evaluation the model gives its logits as ever. Where the outputs have an
    ``aux_loss``, of a mixture's routers, it is added as the model adds it, with the model's factor
    (not that of TRL's ``router_aux_loss_coef``). Under autocast in bf16 the product is in bf16; in
    fp16 in the weight's type, for the gradients are made before a scaler could save small ones.

    That the model leaves its logits alone is seen by one run on two tokens with given logits, in
    evaluation and without gradients; flags, buffers and random states stay. Where parameters are
    on the meta device or sharded, or that run raises, which a warning tells, only the names in
    `TRANSFORMS` are looked up in the config.

    Call this after ``resize_token_embeddings`` and before PEFT: ``modules_to_save`` may then name
    the head; LoRA on it is refused by PEFT. Take the loss of a pass before the model, or a copy of
    it, runs again. ``model.generate()`` wants ``model.eval()`` first. Trainer's
    ``label_smoothing_factor`` has no effect where there is a ``compute_loss_func``.

    Args:
        model: its output head must be a plain linear layer without bias and the last thing done
            to the logits.
        options: of `linear_cross_entropy`: z_loss, chunk_bytes, backend.

    Raises:
        ValueError: the model does something else to its logits, or is an encoder-decoder; from
            the loss: its head did not run before, or the routers' factor is not known.
    """
    head = _plain_head(model)
    _check_config(model.config)
    if not any(_is_elsewhere(p) for p in model.parameters()):
        _check_logits(model, head)
    waiting = head if isinstance(head, WaitingHead) else WaitingHead(head)
    model.set_output_embeddings(waiting)
    note = waiting.note

    def loss_of(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        last, note.last = note.last, None
        next_T = next_labels(labels).flatten()
        denominator = _denominator(next_T, num_items_in_batch)
        total = _loss(_logits(outputs), last, next_T, denominator, options)
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is not None:
            total = total + _router_factor(model) * aux_loss.to(total.device)
        return total

    return loss_of


def next_labels(labels_BL: Tensor) -> Tensor:
    """The next token's label at each position, as transformers' models shift them."""
    return nn.functional.pad(labels_BL[:, 1:], (0, 1), value=IGNORE_INDEX)


def _loss(
    found: Tensor, last: Pass | None, next_T: Tensor, denominator: Tensor | int,
    options: dict[str, Any],
) -> Tensor:  # fmt: skip
    if last is None:
        raise ValueError(
            "the output head that compute_loss_func(model) made has not run since the last loss: "
            "its output head was replaced, or this is a second loss of one forward pass; call "
            "compute_loss_func(model) after the head is replaced"
        )
    if last.weight_VD is None:
        return masked_cross_entropy(
            found.flatten(0, -2), next_T, denominator=denominator,
            vocab_size=last.vocabulary, **options,
        ).total  # fmt: skip
    if last.weight_VD.ndim != 2 or last.weight_VD.untyped_storage().size() == 0:
        raise ValueError(
            f"the output head's weight, {tuple(last.weight_VD.shape)}, is sharded away after the "
            "forward pass, as by DeepSpeed's ZeRO-3 or by FSDP2; use the model's own loss, or give "
            "the head reshard_after_forward=False"
        )
    if found.shape[-1:] != last.weight_VD.shape[1:]:
        raise ValueError(
            f"the model gave {tuple(found.shape)} where hidden states of size "
            f"{last.weight_VD.shape[1]} were wanted; its output head was replaced after "
            "compute_loss_func(model)"
        )
    # The device: under DataParallel the head that ran last may be another device's copy.
    weight_VD = last.weight_VD.to(found.device, last.dtype)
    return linear_cross_entropy(
        found.flatten(0, -2).to(last.dtype), weight_VD, next_T, denominator=denominator,
        vocab_size=last.vocabulary, **options,
    ).total  # fmt: skip


def _denominator(next_T: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | int:
    if num_items_in_batch is None:
        return (next_T != IGNORE_INDEX).sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch.clamp(min=1).to(next_T.device)
    return max(num_items_in_batch, 1)


def _logits(outputs: Any) -> Any:
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        return torch.bfloat16
    # Not fp16: gradients are made in the forward pass, and GradScaler's factor comes after it.
    return weight.dtype


def _router_factor(model: Any) -> float:
    for holder in (model, model.config.get_text_config()):
        for name in ROUTER_FACTORS:
            if getattr(holder, name, None) is not None:
                return float(getattr(holder, name))
    raise ValueError(
        "the model gave an aux_loss but neither it nor its config has "
        f"{' or '.join(ROUTER_FACTORS)}; set one, or output_router_logits=False"
    )


def _plain_head(model: Any) -> Any:
    """The model's head: a linear layer that does nothing else, or one that waits already."""
    head = model.get_output_embeddings()
    if isinstance(head, WaitingHead):
        return head
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"the model's output head is {head}; want a linear layer without bias")
    # An adapter's, a quantized or a hooked layer does more; a parametrized weight is computed anew.
    own = getattr(head.forward, "__func__", None) is not nn.Linear.forward
    if own or not isinstance(head.weight, nn.Parameter):
        raise ValueError(
            f"the model's output head is {head}, which does more than nn.Linear; the loss would "
            "leave that out: call compute_loss_func(model) before the head is wrapped"
        )
    return head


def _check_config(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "the model is an encoder-decoder, whose labels are not shifted; want a causal model"
        )
    text_config = config.get_text_config()
    for name, plain in TRANSFORMS.items():
        value = getattr(text_config, name, plain)
        if value not in (plain, None):
            raise ValueError(f"the model's {name} is {value}, which the loss would leave out")


def _is_elsewhere(parameter: Tensor) -> bool:
    """On the meta device or sharded, by PyTorch or by DeepSpeed: nothing to run a model with."""
    sharded = hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id")
    return parameter.is_meta or sharded or parameter.numel() == 0


def _check_logits(model: Any, head: nn.Module) -> None:
    """Refuse a model that does not give the logits of its head."""
    plain = getattr(model, "_orig_mod", model)  # nothing is compiled for two tokens
    ids_BL = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        with _given_logits(model, head) as given:
            found = _logits(plain.forward(input_ids=ids_BL, use_cache=False))
    except Exception as error:
        # It may want other inputs, or a device that is not there yet: no word about its logits.
        warnings.warn(
            f"the model did not run on two tokens ({type(error).__name__}: {error}), so that "
            f"nothing but {', '.join(TRANSFORMS)} in its config was checked; what else it does to "
            "its logits would be left out of the loss",
            stacklevel=3,
        )
        return
    if not given:
        raise ValueError("the model's forward does not call its output head; use its own loss")
    wanted = given[0].to(found.dtype)
    if found.shape != wanted.shape or not torch.equal(found, wanted):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output head (a cap, a factor, a "
            "mask), which the loss would leave out; use its own loss"
        )
    # Far apart: a label that is hard where it stands, and one that is easy a position before.
    labels_BL = torch.stack([wanted[0, 0].argmin(), wanted[0, 0].argmax()])[None]
    moved = nn.functional.cross_entropy(wanted[0, :1].float(), labels_BL[0, 1:])
    unmoved = nn.functional.cross_entropy(wanted[0].float(), labels_BL[0])
    try:
        with _given_logits(model, head):
            loss = plain.forward(input_ids=ids_BL, labels=labels_BL, use_cache=False).loss.float()
    except Exception:  # it has no such loss
        return
    if torch.isclose(loss, unmoved, rtol=1e-4) and not torch.isclose(moved, unmoved, rtol=1e-3):
        raise ValueError(
            f"{type(model).__name__} compares its logits with the labels at the same positions, as "
            "decoders of encoder-decoders do; want a causal model"
        )


@contextmanager
def _given_logits(model: nn.Module, head: nn.Module) -> Iterator[list[Tensor]]:
    """A head that gives known logits, which are put into the list when it has run."""
    given: list[Tensor] = []

    def stand_in(_head: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        ramp = torch.arange(logits.numel(), device=logits.device) % (2 * LARGEST + 1) - LARGEST
        given[:] = [ramp.to(logits.dtype).view(logits.shape)]
        return given[0].clone()  # some models write into it

    hook = head.register_forward_hook(stand_in)
    try:
        with _undisturbed(model):
            yield given
    finally:
        hook.remove()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, after which flags, buffers and random states are as before."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(devices)):
        try:
            model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training
            for holder, name, buffer, before in buffers:
                holder[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
