"""The demo's task: chains of sums modulo 10, with a thinking trace and an answer to verify.

    user       a=4; b=a+3; c=b*7; d=c-5; c d?
    assistant  <think>
               b=4+3=7; c=7*7=9; d=9-5=4; Wait c=9; Wait b=7;
               </think>
               \\boxed{9 4}

The answer is the last two variables. A guess is right once in a hundred; a model that learned the
steps is right nearly always. The re-checks ("Wait c=9;") have a heavy-tailed count, so a model
trained on them sometimes thinks without end, as large reasoning models do.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from hermes_pipeline.records import Conversation, Message, Prompt

NAMES = "abcdefg"
# Factors 3, 7 and 9 are units modulo 10, so answers stay uniform.
OPERATIONS = (*((op, n) for op in "+-" for n in range(1, 10)), ("*", 3), ("*", 7), ("*", 9))
# P(at least k passes over the work) = k ** -exponent: heavier tails on longer chains.
TAIL_EXPONENT = {2: 2.0, 3: 1.5, 4: 1.0, 5: 0.7, 6: 0.5}
HELD_OUT_OF = 7  # one problem in so many is for evaluation alone
MAX_TOKENS = 256  # longer samples are not made; a row of the tiny recipe holds this many

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROLS = (PAD, START, END)  # special: left out of decoded text
TAGS = (  # one token each, but text: a server must not strip them
    *("<think>", "</think>", "<tools>", "</tools>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Chain:
    """A first value and the operations that make each variable from the one before."""

    first: int
    operations: tuple[tuple[str, int], ...]

    def values(self) -> list[int]:
        """The value of each variable, in order."""
        values = [self.first]
        for op, n in self.operations:
            x = values[-1]
            values.append((x + n if op == "+" else x - n if op == "-" else x * n) % 10)
        return values

    def question(self) -> str:
        """What the user asks."""
        parts = [f"a={self.first};"]
        for before, name, (op, n) in zip(NAMES, NAMES[1:], self.operations, strict=False):
            parts.append(f"{name}={before}{op}{n};")
        last = len(self.operations)
        return " ".join([*parts, NAMES[last - 1], f"{NAMES[last]}?"])

    def work(self) -> list[str]:
        """One line of arithmetic for each operation."""
        values = self.values()
        lines = zip(NAMES[1:], values, self.operations, values[1:], strict=False)
        return [f"{name}={x}{op}{n}={y};" for name, x, (op, n), y in lines]

    def target(self) -> str:
        """The right answer."""
        return " ".join(map(str, self.values()[-2:]))

    def held_out(self) -> bool:
        """Is this problem for evaluation alone? A property of its text, so every run agrees."""
        return zlib.crc32(self.question().encode()) % HELD_OUT_OF == 0


def draw_chain(rng: random.Random, *, held_out: bool) -> Chain:
    """A random chain of two to six operations, from the evaluation's side or from training's."""
    while True:
        steps = rng.choice(tuple(TAIL_EXPONENT))
        operations = tuple(rng.choice(OPERATIONS) for _ in range(steps))
        chain = Chain(rng.randrange(10), operations)
        if chain.held_out() == held_out:
            return chain


def draw_checks(rng: random.Random, chain: Chain) -> list[str]:
    """The re-checks of a trace: a heavy-tailed number of steps whose results are said again."""
    steps = len(chain.operations)
    passes = min(200, int((1.0 - rng.random()) ** (-1.0 / TAIL_EXPONENT[steps])))
    results = list(zip(NAMES[1:], chain.values()[1:], strict=False))
    picked = [rng.choice(results) for _ in range(passes - 1)]
    return [f"Wait {name}={value};" for name, value in picked]


def token_count(chain: Chain, checks: int) -> int:
    """Tokens of the conversation in ChatML with `build_tokenizer`'s vocabulary."""
    return 29 + 14 * len(chain.operations) + 5 * checks


def build_conversation(chain: Chain, checks: Iterable[str]) -> Conversation:
    """A worked solution as training wants it."""
    trace = " ".join([*chain.work(), *checks])
    answer = f"<think>\n{trace}\n</think>\n\\boxed{{{chain.target()}}}"
    messages = (Message("user", chain.question()), Message("assistant", answer, train=True))
    return Conversation(messages, source="chain")


def conversations(seed: int, count: int) -> Iterator[Conversation]:
    """``count`` different worked solutions; no problem of the evaluation is among them.

    Solutions over `MAX_TOKENS` are left out, not cut.
    """
    rng, seen = random.Random(seed), set[str]()
    while len(seen) < count:
        chain = draw_chain(rng, held_out=False)
        checks = draw_checks(rng, chain)
        if token_count(chain, len(checks)) > MAX_TOKENS:
            continue
        conversation = build_conversation(chain, checks)
        text = chain.question() + conversation.messages[1].content
        if text not in seen:
            seen.add(text)
            yield conversation


def chains(seed: int, count: int) -> Iterator[Chain]:
    """``count`` different problems that training never sees."""
    rng, seen = random.Random(seed), set[Chain]()
    while len(seen) < count:
        chain = draw_chain(rng, held_out=True)
        if chain not in seen:
            seen.add(chain)
            yield chain


def build_prompt(chain: Chain) -> Prompt:
    """A problem as an evaluation asks it."""
    question = chain.question()
    meta = {"steps": len(chain.operations)}
    return Prompt(question, (Message("user", question),), chain.target(), meta)


def build_tokenizer(seed: int = 0, *, texts: int = 2_000) -> Tokenizer:
    """A byte-level BPE learned from the task's own text.

    Digits stay single and each tag is one token; the vocabulary has fewer than 512 entries. Any
    text can be encoded, since every byte has a token.
    """
    tokenizer = Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        min_frequency=2,
        special_tokens=list(CONTROLS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Roles are said twice each, so that each becomes one token.
    contents = (m.content for c in conversations(seed, texts) for m in c.messages)
    words = (word for text in contents for word in re.split("</?think>", text))
    tokenizer.train_from_iterator((*ROLES, *ROLES, *words), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


def tokenizer_config() -> Mapping[str, Any]:
    """What transformers wants to know beside `tokenizer.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
