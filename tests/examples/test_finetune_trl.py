"""The TRL example trains a tiny model on packed rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def tiny_model(folder: Path) -> None:
    """A Llama of two layers and a tokenizer of ten words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<eos>", *"abcdefghi"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=10, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def test_the_example_learns(tmp_path: Path, repository: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    tiny_model(model)
    texts = [" ".join("abcdefghi"[i % 5 : i % 5 + 3 + i % 2]) for i in range(64)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code = (
        "import sys; from pathlib import Path; import finetune_trl;"
        "print(finetune_trl.main(*map(Path, sys.argv[1:]), steps=30, row_length=32, rate=1e-2))"
    )
    paths = [repository / "python" / "examples", repository, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, model, data, tmp_path / "out"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) < 1.5  # ten words at random: 2.3
    assert (tmp_path / "out" / "model.safetensors").exists()
