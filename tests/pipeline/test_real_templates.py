"""Chat templates of released models on real conversations: each exact or refused, never shifted."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from hermes_pipeline.chat import Refused, parse
from hermes_pipeline.records import Conversation
from hermes_pipeline.services.hub import load_tokenizer
from hermes_pipeline.tokenization import Rendering, Tokenization, TokenizerState
from hermes_pipeline.tokenization.turns import Reader

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]

# What a template marks its turns with must be one token, as in its own model's tokenizer.
MARKERS = re.compile(
    r"<[|｜][^|｜<>\s]+[|｜]>|<\|[A-Za-z_]+\|?>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]"
    r"|\[e~\[|<extra_id_\d>|<SPECIAL_\d+>|<seed:\w+>"
)
# What may stand beside an answer but markers: an empty thought, the name of gpt-oss's channel.
CHANNELS = ("", "<think>\n\n</think>", "final", "None")
SETS = ("glaive_toolcall_en_first30.messages", "sft_demo.messages", "vicuna_identity.sharegpt")

# Conversations that are exact, of 30 with tools, 500 of one question and 500 of several turns.
EXACT = json.loads(Path(__file__).with_name("real_templates.json").read_text())


def records(folder: Path) -> dict[str, list[Any]]:
    """All conversations, by data set."""
    return {
        name: [json.loads(line) for line in gzip.open(folder / f"{name}.jsonl.gz")] for name in SETS
    }


def tokenization(template: str, backend: str) -> Tokenization:
    """The template with a tokenizer that knows its markers."""
    tokenizer = Tokenizer.from_str(backend)
    markers = sorted({*MARKERS.findall(template), "<s>", "</s>"})
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    added = tokenizer.get_added_tokens_decoder().values()
    state = TokenizerState(
        backend=tokenizer.to_str(),
        named_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        special_tokens=tuple(token.content for token in added if token.special),
    )
    return Tokenization(state, template, date="2025-08-25")


def fault(ours: Tokenization, record: Any) -> str:
    """Why the kept text of a record is wrong, looked at from outside; "" where it is right."""
    conversation = parse(record)
    sample = ours.sample(conversation)
    ids = sample.token_ids.tolist()
    stretches = [ours.encoder.decode(ids[start:end]) for start, end in sample.kept_spans]
    answers = [m for m in conversation.messages if m.role == "assistant"]
    if len(stretches) != len(answers):
        return f"{len(stretches)} kept stretches for {len(answers)} answers"
    for text, message in zip(stretches, answers, strict=True):
        content = message.content.strip()
        if content not in text:
            return f"{content!r} is not in {text!r}"
        for call in message.tool_calls:
            if call["function"]["name"] not in text:
                return f"the call of {call['function']['name']} is not in {text!r}"
        if not message.tool_calls:
            around = text.replace(content, "", 1)
            if not MARKERS.search(around[-40:]) or MARKERS.sub("", around).strip() not in CHANNELS:
                return f"beside {content!r} stands {around!r}"
    return ""


def examine(job: tuple[Path, str, dict[str, list[Any]]]) -> tuple[str, list[int], list[str]]:
    """A template's name, exact conversations by data set, and faults of those."""
    path, backend, sets = job
    ours = tokenization(path.read_text(), backend)
    counts, faults = [], []
    for conversations in sets.values():
        exact = 0
        for record in conversations:
            try:
                wrong = fault(ours, record)
            except Refused:
                continue
            exact += 1
            if wrong:
                faults.append(wrong)
        counts.append(exact)
    return f"{path.parent.name}/{path.name}", counts, faults


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_every_template_is_exact_or_refuses(shared_data: Path) -> None:
    backend = load_tokenizer(str(shared_data / "tokenizers" / "qwen" / "tokenizer.json.gz"))
    sets = records(shared_data / "conversations")
    paths = sorted((shared_data / "chat_templates").rglob("*.jinja"))
    jobs = [(path, backend.backend_tokenizer.to_str(), sets) for path in paths]
    # By fork: a fresh interpreter would not find this module by its name.
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        results = list(pool.map(examine, jobs))
    assert {name: faults[:3] for name, _, faults in results if faults} == {}
    assert {name: counts for name, counts, _ in results} == EXACT
    assert Counter(any(counts) for counts in EXACT.values())[True] >= 25


def rendering(ours: Tokenization, conversation: Conversation) -> Rendering | str:
    """What is read, or why it is refused."""
    try:
        return ours.render(conversation)
    except Refused as error:
        return str(error)


def test_turns_that_are_trusted_are_those_of_the_slow_twin(
    shared_data: Path, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        [parse(record) for record in some[:12]]
        for some in records(shared_data / "conversations").values()
    ]
    # Several one after another, too: what stands in the same surroundings is what is trusted.
    conversations = [each for some in given for each in some] + [
        Conversation(tuple(m for each in some[at : at + 4] for m in each.messages), some[at].tools)
        for some in given
        for at in range(0, len(some), 4)
    ]
    for path in sorted((shared_data / "chat_templates").rglob("*.jinja")):
        ours = tokenization(path.read_text(), backend.to_str())
        trusted = [rendering(ours, each) for each in conversations]
        with monkeypatch.context() as patch:
            patch.setattr("hermes_pipeline.tokenization.Reader", partial(Reader, trust=False))
            assert trusted == [rendering(ours, each) for each in conversations], path
