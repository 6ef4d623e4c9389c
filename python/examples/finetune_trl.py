"""Fine-tune with TRL on packed rows: `python finetune_trl.py MODEL DATA.jsonl OUT`.

One line, `hermes_core.hf.register()`, gives a causal model of transformers attention that stays
inside each sample of a packed row, on a CPU too; a model that wants another kind is refused. DATA
has a "text" or a "messages" on each line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import hermes_core.hf


def main(
    model: Path,
    data: Path,
    out: Path,
    *,
    steps: int = 100,
    row_length: int = 1024,
    rate: float = 2e-5,
) -> float:
    """Train for ``steps`` and return the last loss."""
    hermes_core.hf.register()
    trainer = SFTTrainer(
        model=str(model),
        args=SFTConfig(
            output_dir=str(out),
            packing=True,
            max_length=row_length,
            max_steps=steps,
            logging_steps=1,
            per_device_train_batch_size=2,
            learning_rate=rate,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            model_init_kwargs={"attn_implementation": "hermes"},
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
    )
    trainer.train()
    trainer.save_model(str(out))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return float(losses[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    print(main(arguments.model, arguments.data, arguments.out))
