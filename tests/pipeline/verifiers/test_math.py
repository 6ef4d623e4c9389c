"""Boxed answers: what is accepted, what is refused, and that nothing can hang or crash them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Trace
from hermes_pipeline.verifiers import VERIFIERS, math
from hermes_pipeline.verifiers.math import (
    VerifierError,
    equal,
    last_boxed,
    verify_boxed,
    verify_boxed_text,
)


def trace(answer: str) -> Trace:
    return Trace(text=answer, thinking="", answer=answer)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{ 9 4 }", "9 4"),
        (r"\boxed {7}", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed 5 is it", "5"),
        (r"\boxed\pi", r"\pi"),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{\}", None),
        (r"\boxed", None),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_last_boxed_reads_the_last_box(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@given(st.text(alphabet=st.sampled_from("{}\\boxedf 1$\n"), max_size=60))
def test_last_boxed_never_fails_on_junk(text: str) -> None:
    found = last_boxed(text)
    assert found is None or found in text


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{x+1}", "1+x"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{$7$}", "7"),
    ],
)
def test_verify_boxed_accepts_equal_mathematics(answer: str, target: str) -> None:
    assert verify_boxed(trace(answer), target).passed


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        (r"\boxed{0.51}", r"\frac{1}{2}"),
        (r"\boxed{x-1}", "1+x"),
        (r"\boxed{(2, 1)}", "(1,2)"),
        (r"\boxed{}", "1"),
        ("1", "1"),
        (r"\boxed{1} \boxed{2}", "1"),
    ],
)
def test_verify_boxed_refuses_other_answers(answer: str, target: str) -> None:
    assert not verify_boxed(trace(answer), target).passed


@pytest.mark.parametrize(
    "written",
    [
        r"1\,000",
        r"1\;000",
        r"1\:000",
        r"1\ 000",
        "1~000",
        r"1\!000",
        r"1,\!000",
        "1{,}000",
        "1000.",
    ],
)
def test_a_thousand_is_read_as_it_is_written(written: str) -> None:
    assert equal(written, "1000")
    assert equal("1000", written)
    for other in ("0", "1", "1.000", "(1, 0)", "100", "1000000"):
        assert not equal(written, other)
        assert not equal(other, written)


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("5.", "5"),
        ("$5.$", "5"),
        ("0.5.", r"\frac12"),
        ("(1,2).", "(1, 2)"),
        (r"(1\,000, 2)", "(1000,2)"),
        ("(1{,}000, 2)", "(1000,2)"),
        (r"-12\,345\,678", "-12345678"),
        (r"1\,000.5", "1000.5"),
        (r"1\,000\pi", r"1000\pi"),
        ("13_{7}", "13_7"),
        ("13_{(7)}", "13_7"),
        ("x=13_7", "13_{7}"),
        ("13_7, 14_7", "14_7,13_7"),
        ("13_{10}", "13"),
        (r"\log_2 3", r"\log_{2}{3}"),
        (r"\frac 1 2", "0.5"),
        (r"\int^1_0 x dx", "1/2"),
        ("x_1", "x_{1}"),
    ],
)
def test_numbers_are_equal_however_they_are_written(answer: str, target: str) -> None:
    assert equal(answer, target)
    assert equal(target, answer)


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        (r"(1,\,000)", "1000"),
        (r"1,\,000", "1000"),
        (r"1\,00", "100"),
        (r"1\,0000", "10000"),
        (r"1\,000\,5", "1005"),
        (r"12\,3", "15"),
        (r"0.123\,456", "56.088"),
        ("1 000", "0"),
        ("9 4", "13"),
        ("1 1/2", "1"),
        ("1..", "1"),
        ("13_{7}", "13_{8}"),
        ("x=13_7", "x=13_8"),
        ("(13_7,13_8)", "(13_8,13_7)"),
        ("13_7", "13"),
        ("13_7", "10"),
        ("13_7+1", "14_7"),
        ("13_7.5", "13.5"),
        ("1.13_7", "1.13"),
        ("19_8", "19"),
        ("13_{x}", "13"),
        (r"13_{\text{seven}}", r"13_{\text{eight}}"),
        ("A1_{16}", "A1_{12}"),
    ],
)
def test_numbers_differ_in_digits_groups_and_base(answer: str, target: str) -> None:
    assert not equal(answer, target)
    assert not equal(target, answer)


def test_verify_boxed_looks_at_the_answer_alone() -> None:
    thought = Trace(text=r"<think>\boxed{4}", thinking=r"\boxed{4}", answer="")
    verdict = verify_boxed(thought, "4")
    assert not verdict.passed
    assert verdict.reason == "no answer after the thinking"


def test_verify_boxed_text_keeps_digits_apart() -> None:
    assert verify_boxed_text(trace(r"\boxed{9  4}"), "9 4").passed
    assert not verify_boxed_text(trace(r"\boxed{94}"), "9 4").passed


def test_verdict_says_what_it_got_and_wanted() -> None:
    assert verify_boxed(trace(r"\boxed{5}"), "4").reason == "got 5, want 4"


JUNK = [
    r"\frac{",
    r"\sqrt{" * 100,
    "(" * 1000,
    "\x00\ud7ff\U0001f600",
    r"\begin{pmatrix} 1 & 2",
    "=" * 50,
    "import os",
]


@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_a_wrong_answer_and_no_crash(junk: str) -> None:
    assert not verify_boxed(trace(f"\\boxed{{{junk}}}"), "4").passed


def test_a_slow_comparison_ends_at_its_limit_and_the_next_one_works() -> None:
    start = time.monotonic()
    verdict = verify_boxed(trace(r"\boxed{9^{9^{9^{9}}}+1}"), r"9^{9^{9^{9}}}")
    assert not verdict.passed
    assert time.monotonic() - start < 40
    assert verify_boxed(trace(r"\boxed{0.25}"), r"\frac14").passed


def test_a_huge_answer_is_refused_at_once() -> None:
    start = time.monotonic()
    assert not verify_boxed(trace(r"\boxed{" + "1+" * 1_000_000 + "1}"), "4").passed
    assert time.monotonic() - start < 5


@pytest.fixture
def math_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts this source in math-verify's place."""

    def install(source: str) -> None:
        (tmp_path / "math_verify.py").write_text(source)
        path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
        math._COMPARISON.close()

    yield install
    math._COMPARISON.close()


MISSING = "raise ModuleNotFoundError(\"No module named 'math_verify'\", name='math_verify')"
BROKEN = "import os\nparse = lambda *_, **__: {}\nverify = None"


def test_without_math_verify_there_is_no_verdict(math_verify: Callable[[str], None]) -> None:
    math_verify(MISSING)
    for _ in range(2):
        with pytest.raises(UserError, match=r"math-verify: pip install 'hermes4-core\[pipeline\]'"):
            VERIFIERS["boxed"](trace(r"\boxed{x+1}"), "1+x")
    with pytest.raises(UserError, match="No module named 'math_verify'"):
        equal("x+1", "1+x")
    assert verify_boxed(trace(r"\boxed{x+1}"), "x+1").passed  # which needs no mathematics


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os; os._exit(7)", "math-verify did not load: its process ended with 7"),
        (BROKEN.format("os.abort()"), "comparing 0.5 with 1/2 failed: .* ended by signal 6"),
        (BROKEN.format("os.kill(os.getpid(), 9)"), "comparing .* failed: .* ended by signal 9"),
        (BROKEN.format("os._exit(3)"), "comparing .* failed: its process ended with 3"),
    ],
)
def test_a_comparison_that_breaks_is_no_verdict(
    math_verify: Callable[[str], None], source: str, message: str
) -> None:
    math_verify(source)
    with pytest.raises(VerifierError, match=message):
        verify_boxed(trace(r"\boxed{0.5}"), "1/2")


@pytest.mark.parametrize(
    ("source", "limit"), [("sum(iter(int, 1))", "time"), ("bytearray(1 << 40)", "memory")]
)
def test_a_comparison_at_its_limit_is_a_wrong_answer(
    math_verify: Callable[[str], None], source: str, limit: str
) -> None:
    math_verify(BROKEN.format(source))
    verdict = verify_boxed(trace(r"\boxed{0.5}"), "1/2")
    assert (verdict.passed, verdict.reason) == (
        False, f"got 0.5, which cannot be compared in {limit}",
    )  # fmt: skip


def test_a_reply_after_ctrl_c_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(limit_s: float) -> bytes:
        raise KeyboardInterrupt

    assert equal("0.25", "1/4")
    with monkeypatch.context() as patch:
        patch.setattr(math._COMPARISON, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            equal("0.5", "1/3")
    assert equal("0.5", "1/2")


def test_the_extra_pipeline_brings_math_verify(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert any(p.startswith("math-verify") for p in project["optional-dependencies"]["pipeline"])


def test_threads_may_compare_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: equal(f"{i}/2", f"\\frac{{{i}}}{{2}}"), range(40)))
    assert results == [True] * 40


def test_the_child_ends_with_its_parent() -> None:
    code = (
        "import os, signal; from hermes_pipeline.verifiers import math as m;"
        "assert m.equal('0.5', '1/2'); print(m._COMPARISON._child.pid, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}/cmdline"):
        with open(f"/proc/{pid}/stat") as file:
            if ") Z " in file.read():  # ended; only nobody has collected it yet
                return
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_every_verifier_is_found_by_name() -> None:
    assert VERIFIERS["boxed"](trace(r"\boxed{1}"), "1").passed
    assert VERIFIERS["boxed_text"](trace(r"\boxed{1}"), "1").passed
