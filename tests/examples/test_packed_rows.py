"""The examples run as their first lines say, and do what they claim."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from hermes_core import StoreWriter, open_store, pack

VOCABULARY = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("examples") / "store"
    with StoreWriter(folder, meta={"tokenizer": "none"}, vocab_size=VOCABULARY) as writer:
        for length in rng.integers(2, 100, 400):
            writer.append(rng.integers(0, VOCABULARY, length), [[length // 3, length]])
        writer.finish()
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("examples") / "model"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def run(repository: Path, name: str, *arguments: object, cwd: Path) -> str:
    path = repository / "python" / "examples" / name
    assert len(path.read_text().splitlines()) < 40
    command = [sys.executable, "-P", str(path), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, check=True, capture_output=True, text=True, timeout=200
    ).stdout


def load(repository: Path, name: str) -> ModuleType:
    path = repository / "python" / "examples" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_loop_goes_on_to_the_same_bits(repository: Path, store: Path, tmp_path: Path) -> None:
    def loop(checkpoint: str, steps: int) -> str:
        return run(
            repository, "resumable_loop.py", store, tmp_path / checkpoint, steps, cwd=tmp_path
        )

    whole = loop("whole", 7)
    assert loop("parts", 3) + loop("parts", 4) == whole
    lines = [line.split() for line in whole.splitlines()]
    assert [int(rows) for rows, *_ in lines] == [2, 4, 6, 8, 10, 12, 14]
    assert len({loss for *_, loss in lines}) == 7


def test_a_stream_is_packed_while_it_is_read(repository: Path, store: Path, tmp_path: Path) -> None:
    samples = open_store(store)
    asked = sum(min(n, 2048) - max(n // 3, 1) for n in samples.lengths)
    out = run(repository, "pack_a_stream.py", store, cwd=tmp_path)
    rows = -(-int(samples.lengths.sum()) // 2048)
    assert out == f"400 samples in {rows} rows, {asked} tokens in the loss\n"


def test_trainer_learns_from_rows_packed_by_index(
    repository: Path, store: Path, model: Path, tmp_path: Path
) -> None:
    out = run(repository, "train_on_packed_rows.py", store, model, cwd=tmp_path)
    assert "lower bound" in out
    assert 3 < float(out.split()[-1]) < np.log(VOCABULARY) + 0.1


def test_rows_packed_by_index_give_the_loss_of_their_samples(
    repository: Path, store: Path, model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    example = load(repository, "train_on_packed_rows.py")
    samples = open_store(store)
    network = AutoModelForCausalLM.from_pretrained(model, use_cache=False).eval()
    packing = pack(samples.lengths, row_length=256, fingerprint=samples.fingerprint)
    row = example.packed_rows(samples, packing)[5]
    with torch.no_grad():
        packed = network(**{name: torch.tensor(value)[None] for name, value in row.items()}).loss
        total, count = 0.0, 0
        for sample in packing.samples[packing.row_offsets[5] : packing.row_offsets[6]]:
            ids, mask = samples[int(sample)]
            labels = np.where(mask, ids.astype(np.int64), -100)
            kept = int((labels[1:] != -100).sum())
            if kept:
                given = torch.tensor(ids.astype(np.int64))[None], torch.tensor(labels)[None]
                total += float(network(given[0], labels=given[1]).loss) * kept
                count += kept
    assert float(packed) == pytest.approx(total / count, rel=1e-5)
