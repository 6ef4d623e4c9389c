"""A small tokenizer made in this process, and what the tests of the data path share."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from dialects import CHATML, LLAMA3, Dialect
from hermes_pipeline.chat import parse
from hermes_pipeline.cli import main
from hermes_pipeline.exits import STOPPING
from hermes_pipeline.services.hub import load_template
from hermes_pipeline.tokenization import Tokenization, TokenizerState
from running import Ended, Hermes4
from tokenizing import Tokenize, arguments, mixed, write_lines

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<s>",
    "</s>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
TEXTS = [
    "system user assistant tool\n",
    "You are a helpful assistant. What is the weather in Zürich? It is 21 degrees.\n\n",
    '{"name": "get_weather", "arguments": {"city": "Zürich"}}\n',
    "<<48/2=24>> clips; 日本語のテキスト и русский текст 🙂🙂",
]

Make = Callable[..., Tokenization]


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    """A byte-level BPE; every tag is a special token, so that none is mistaken for an end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make(backend: Tokenizer) -> Make:
    """Makes a tokenization from a template's name or source, with more special tokens."""

    def made(
        template: str,
        special: Sequence[str] = (),
        *,
        eos: str = "<|im_end|>",
        bos: str = "<s>",
        plain: Sequence[AddedToken] = (),
        normalizer: normalizers.Normalizer | None = None,
    ) -> Tokenization:
        tokenizer = Tokenizer.from_str(backend.to_str())
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in special]
        )
        tokenizer.add_tokens(list(plain))
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        added = tokenizer.get_added_tokens_decoder().values()
        state = TokenizerState(
            backend=tokenizer.to_str(),
            named_tokens={"bos_token": bos, "eos_token": eos},
            special_tokens=tuple(token.content for token in added if token.special),
        )
        if template.startswith("hermes_"):
            template = load_template(template, None)[1]
        return Tokenization(state, template, date="2025-08-25")

    return made


@pytest.fixture(params=[CHATML, LLAMA3], ids=lambda dialect: dialect.name)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    """Each template in turn."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def tokenizer_folder(backend: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer as a folder that transformers wrote."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, as a folder that vLLM serves."""
    from hermes_pipeline.stages import demo, train

    folder = tmp_path_factory.mktemp("served")
    demo.write_tokenizer(folder / "tokenizer", seed=0)
    train.init("tiny", tokenizer=str(folder / "tokenizer"), out=folder / "model", seed=0)
    template = folder / "model" / "chat_template.jinja"
    template.write_text(load_template(demo.TEMPLATE, None)[1])
    return folder / "model"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("few") / "chats.jsonl", mixed(20))


@pytest.fixture
def tokenize(hermes4: Hermes4, tokenizer_folder: Path) -> Tokenize:
    """Runs `hermes4 tokenize` in this process; the last of equal options counts."""

    def run(data: Path, out: Path, *more: object, workers: int = 1) -> Ended:
        return hermes4(*arguments(data, out, tokenizer_folder, workers=workers), *more)

    return run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`datasets` keeps what it makes in this test's folder, and in silence."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def hermes4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Hermes4:
    """Runs the command `hermes4` in this process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["hermes4", *map(str, words)])
        code: object = 0
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        finally:  # a command that is stopped ignores all of them from there on
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Ended(code, *capsys.readouterr())

    return run


def kept_texts(tokenization: Tokenization, record: Any) -> list[str]:
    """Return the kept stretches of a record, decoded from the kept tokens alone."""
    sample = tokenization.sample(parse(record))
    ids = sample.token_ids.tolist()
    return [tokenization.encoder.decode(ids[start:end]) for start, end in sample.kept_spans]
