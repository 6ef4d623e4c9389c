"""A `datasets` data set of rows packed by index, for transformers' Trainer and TRL.

    python train_on_packed_rows.py STORE MODEL

The data set holds row numbers; a batch's tokens are gathered from the store when it is asked for,
so nothing is copied and a new epoch is a new plan. Positions restart in each sample, by which
transformers keeps attention inside it.
"""

import sys

import datasets
import numpy as np
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hermes_core import IGNORE_INDEX, Packing, Samples, build_rows, open_store, pack


def packed_rows(samples: Samples, packing: Packing) -> datasets.Dataset:
    def gather(batch: dict[str, list[int]]) -> dict[str, np.ndarray]:
        rows = build_rows(samples, packing, batch["row"])
        labels = np.roll(rows.labels, 1, axis=1)  # transformers shifts them back by itself
        labels[:, 0] = IGNORE_INDEX
        return {"input_ids": rows.input_ids, "position_ids": rows.positions, "labels": labels}

    return datasets.Dataset.from_dict({"row": range(packing.rows)}).with_transform(gather)


if __name__ == "__main__":
    # With a cache, transformers does not look at the positions, and attention crosses samples.
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], use_cache=False)
    store = open_store(sys.argv[1])
    packing = pack(store.lengths, row_length=256, too_long="drop", fingerprint=store.fingerprint)
    arguments = TrainingArguments(
        "out", max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        remove_unused_columns=False, report_to=[], save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=packed_rows(store, packing))
    print(packing.report(), trainer.train().metrics["train_loss"], sep="\n")
