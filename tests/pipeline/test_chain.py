"""The demo's task: right values, nothing held out in training, one text for one seed, tokens."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hermes_pipeline.tasks.chain import (
    CONTROLS,
    MAX_TOKENS,
    OPERATIONS,
    ROLES,
    TAGS,
    TAIL_EXPONENT,
    Chain,
    build_conversation,
    build_prompt,
    build_tokenizer,
    chains,
    conversations,
    draw_chain,
    draw_checks,
    token_count,
)

any_chain = st.builds(
    Chain,
    st.integers(0, 9),
    st.lists(st.sampled_from(OPERATIONS), min_size=2, max_size=6).map(tuple),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def render(chain: Chain, answer: str) -> str:
    """The conversation as the hermes_chatml template writes it."""
    return (
        f"<|im_start|>user\n{chain.question()}<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    )


def test_a_chain_worked_out_by_hand() -> None:
    chain = Chain(4, (("+", 3), ("*", 7), ("-", 5)))
    assert chain.question() == "a=4; b=a+3; c=b*7; d=c-5; c d?"
    assert chain.values() == [4, 7, 9, 4]
    assert chain.target() == "9 4"
    conversation = build_conversation(chain, ["Wait c=9;"])
    assert conversation.messages[1].content == (
        "<think>\nb=4+3=7; c=7*7=9; d=9-5=4; Wait c=9;\n</think>\n\\boxed{9 4}"
    )


def test_the_assistant_alone_is_trained() -> None:
    conversation = next(conversations(0, 1))
    assert [(m.role, m.train) for m in conversation.messages] == [
        ("user", False),
        ("assistant", True),
    ]


@given(any_chain)
def test_each_line_of_work_is_true_modulo_ten(chain: Chain) -> None:
    for line, value in zip(chain.work(), chain.values()[1:], strict=True):
        match = re.fullmatch(r"[b-g]=(\d)([+*-])(\d)=(\d);", line)
        assert match is not None
        x, op, n, y = match.groups()
        wanted = {"+": int(x) + int(n), "-": int(x) - int(n), "*": int(x) * int(n)}[op] % 10
        assert int(y) == wanted == value


@given(any_chain, st.integers(0, 2**32))
def test_each_check_repeats_a_value_of_the_work(chain: Chain, seed: int) -> None:
    values = dict(zip("abcdefg", chain.values(), strict=False))
    for check in draw_checks(random.Random(seed), chain):
        match = re.fullmatch(r"Wait ([b-g])=(\d);", check)
        assert match is not None
        assert values[match.group(1)] == int(match.group(2))


def test_training_never_sees_a_problem_of_the_evaluation() -> None:
    asked = {build_prompt(chain).key for chain in chains(1, 400)}
    trained = {c.messages[0].content for c in conversations(0, 5_000)}
    assert not asked & trained


def test_about_one_problem_in_seven_is_held_out() -> None:
    rng = random.Random(0)
    drawn = [draw_chain(rng, held_out=bool(rng.getrandbits(1))) for _ in range(200)]
    assert {c.held_out() for c in drawn} == {True, False}
    every = [Chain(a, (x, y)) for a in range(10) for x in OPERATIONS for y in OPERATIONS]
    assert sum(c.held_out() for c in every) / len(every) == pytest.approx(1 / 7, abs=0.02)


def test_problems_and_solutions_are_distinct() -> None:
    assert len(set(chains(3, 1_000))) == 1_000
    texts = [tuple(m.content for m in c.messages) for c in conversations(3, 5_000)]
    assert len(set(texts)) == 5_000


def test_answers_are_spread_evenly() -> None:
    targets = [chain.target() for chain in chains(5, 3_000)]
    assert len(set(targets)) > 90
    assert max(map(targets.count, set(targets))) < 0.03 * len(targets)


def test_longer_chains_have_heavier_tails() -> None:
    rng = random.Random(0)
    means = {}
    for steps in TAIL_EXPONENT:
        chain = Chain(1, OPERATIONS[:steps])
        means[steps] = sum(len(draw_checks(rng, chain)) for _ in range(2_000)) / 2_000
    assert list(means.values()) == sorted(means.values())


def test_one_seed_gives_one_text_in_every_process() -> None:
    code = (
        "import hashlib; from hermes_pipeline.tasks.chain import conversations, build_tokenizer;"
        "texts = ''.join(m.content for c in conversations(7, 500) for m in c.messages);"
        "texts += build_tokenizer(texts=200).to_str();"
        "print(hashlib.sha256(texts.encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_other_seeds_give_other_texts() -> None:
    first = [c.messages[0].content for c in conversations(0, 50)]
    assert first != [c.messages[0].content for c in conversations(1, 50)]


def test_token_count_is_that_of_the_tokenizer(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        chain = draw_chain(rng, held_out=False)
        checks = draw_checks(rng, chain)
        text = render(chain, build_conversation(chain, checks).messages[1].content)
        assert len(tokenizer.encode(text).ids) == token_count(chain, len(checks))


def test_no_sample_is_longer_than_a_row(tokenizer: Tokenizer) -> None:
    lengths = []
    for conversation in conversations(0, 3_000):
        user, assistant = conversation.messages
        text = f"<|im_start|>user\n{user.content}<|im_end|>\n<|im_start|>assistant\n"
        lengths.append(len(tokenizer.encode(f"{text}{assistant.content}<|im_end|>\n").ids))
    assert max(lengths) <= MAX_TOKENS
    assert max(lengths) > 200
    assert 75 <= sorted(lengths)[len(lengths) // 2] <= 120


def test_digits_tags_and_roles_are_one_token_each(tokenizer: Tokenizer) -> None:
    for text in (*"0123456789", *CONTROLS, *TAGS, *ROLES):
        assert len(tokenizer.encode(text).ids) == 1, text
    assert len(tokenizer.encode("42").ids) == 2


def test_the_vocabulary_is_small(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() < 512


def test_thinking_tags_stay_in_decoded_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>\nb=1;\n</think>\n<|im_end|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\nb=1;\n</think>\n"


@given(st.text(max_size=40))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert _TOKENIZER.decode(_TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


_TOKENIZER = build_tokenizer(texts=50)
