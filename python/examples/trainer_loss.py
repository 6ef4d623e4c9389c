"""Fine-tune with transformers' Trainer and a loss that computes logits at kept tokens alone."""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hermes_core.hf import compute_loss_func

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=4, **sizes))

# Sixteen samples that count by one; the loss is on the second half of each.
ids = torch.arange(16)[:, None] * 7 + torch.arange(32)
labels = torch.where(torch.arange(32) < 16, -100, ids)
samples = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
    )
    loss = compute_loss_func(model)
    trainer = Trainer(model, arguments, train_dataset=samples, compute_loss_func=loss)
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")
