"""A DataLoader that resumes: `python resumable_loop.py STORE CHECKPOINT STEPS`."""

import sys
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset

from hermes_core import RowLoader, open_store, pack


class Batches(IterableDataset):
    def __init__(self, rows: RowLoader) -> None:  # whose thread builds batches ahead: no workers
        self.rows = rows
        self.state_dict, self.load_state_dict = rows.state_dict, rows.load_state_dict

    def __iter__(self):
        return ({"ids": batch.input_ids, "labels": batch.labels} for batch in self.rows)


if __name__ == "__main__":
    store, checkpoint = open_store(sys.argv[1]), Path(sys.argv[2])
    packing = pack(store.lengths, row_length=256, seed=0)  # another seed for the next epoch
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64))
    parts = {"model": model, "adam": torch.optim.Adam(model.parameters(), 1e-2)}
    parts["data"] = Batches(RowLoader(store, packing, batch_rows=2))
    for name, state in torch.load(checkpoint).items() if checkpoint.exists() else ():
        parts[name].load_state_dict(state)
    for batch in islice(DataLoader(parts["data"], batch_size=None), int(sys.argv[3])):
        loss = torch.nn.functional.cross_entropy(model(batch["ids"]).mT, batch["labels"])
        model.zero_grad()
        loss.backward()
        parts["adam"].step()
        new = checkpoint.with_suffix(".new")
        torch.save({name: part.state_dict() for name, part in parts.items()}, new)
        new.replace(checkpoint)  # whole, or not at all
        print(f"{parts['data'].state_dict()['rows']} rows, loss {loss.item():.9f}")
