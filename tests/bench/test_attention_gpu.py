"""The benchmark of attention on a GPU, run on a CPU: with peers of ours, on a clock of ours."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import attention_gpu, attention_gpu_peers, harness
from bench.attention import Shape, inputs, loop, sees
from bench.attention_gpu import at_shape, fault, milliseconds, peak_bytes, truth, without_gradient
from bench.attention_gpu_peers import (
    FLEX,
    FORWARD_ALONE,
    compiled_flex,
    compiled_mask,
    flashes,
    flex,
)
from bench.harness import Result
from hermes_kernels import reference

SHAPE = Shape("two", (40, 24), (4, 2), 64, torch.float32)
CPU = torch.device("cpu")
(ALONE,) = FORWARD_ALONE


def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return loop(q, k, v, SHAPE.lengths)


def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError("\nno such engine\nand a trace")


def refuses_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = right(q, k, v)
    if torch.is_grad_enabled():
        out.register_hook(lambda _: refuses(q, k, v))
    return out


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (right, ""),
        (without_gradient(right), ""),
        (refuses, "NotImplementedError: no such engine"),
        (refuses_gradients, "NotImplementedError: no such engine"),
        (lambda q, k, v: right(q, k, 2 * v), "out is off by 1.0e+00"),
        (lambda q, k, v: right(q.detach(), k, v) + 0 * q, "dq is off by 1.0e+00"),
        (lambda q, k, v: right(q, k, v) * torch.nan, "out is off by nan"),
    ],
    ids=["right", "forward-alone", "refuses", "no-gradient", "wrong", "wrong-gradient", "nan"],
)
def test_a_peer_is_timed_only_if_it_is_right(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], why: str
) -> None:
    one = inputs(SHAPE)
    assert fault(call, one, truth(SHAPE, one)) == why


def test_the_truth_head_by_head_is_that_of_all_heads_at_once() -> None:
    q, k, v, grad = one = inputs(SHAPE)
    wide = [x.detach()[:, :n].double().requires_grad_() for x, n in ((q, 2), (k, 1), (v, 1))]
    out = reference.varlen_attention(*wide, SHAPE.lengths, SHAPE.size**-0.5)
    wanted = [out, *torch.autograd.grad(out, wide, grad[:, :2].double())]
    for got, expected in zip(truth(SHAPE, one), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


class Event:
    """In a CUDA event's place: the time of this host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A CPU in a GPU's place, and the cycles that it was told to spin."""
    spins: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 8 << 20)
    monkeypatch.setattr(attention_gpu, "OURS", ("cpu",))
    monkeypatch.setattr(attention_gpu, "RUNS", 3)
    monkeypatch.setattr(attention_gpu, "compiled_mask", lambda: refuses)
    return spins


def told(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Result | str]:
    made = {name: functools.partial(lambda call: call, call) for name, call in given.items()}
    monkeypatch.setattr(attention_gpu, "peers", lambda *_: made)
    return at_shape(SHAPE, CPU, 1.0, {}, {})


def test_what_a_peer_raises_stops_neither_the_others_nor_the_run(
    device: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "a": refuses,
        "b": refuses_gradients,
        "c": right,
        FLEX: right,
        ALONE: refuses_gradients,
    }
    found = list(told(given, monkeypatch))
    timed = [(x.backend, x.op) for x in found if isinstance(x, Result)]
    assert timed == [
        *(("cpu", "attention forward"), ("cpu", "attention backward")),
        ("b, forward", "attention forward"),
        *(("c", "attention forward"), ("c", "attention backward")),
        *((FLEX, "attention forward"), (FLEX, "attention backward")),
        (f"{ALONE}, forward", "attention forward"),
        ("our segments", "attention once a batch"),
        ("FlexAttention's mask, eager", "attention once a batch"),
    ]
    assert [x for x in found if isinstance(x, str)] == [
        f"\n{SHAPE}",
        "a: skipped: NotImplementedError: no such engine",
        "a, forward: skipped: NotImplementedError: no such engine",
        "b: skipped: NotImplementedError: no such engine",
        "FlexAttention's mask, compiled: skipped: TypeError: refuses() got an unexpected keyword "
        "argument 'device'",
    ]


def test_every_line_tells_the_ratio_to_ours_and_the_memory_beyond_the_inputs(
    device: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter(range(1, 100))
    monkeypatch.setattr(attention_gpu, "milliseconds", lambda _: [float(next(values))] * 3)
    notes = {
        (x.backend, x.op.removeprefix("attention ")): x.notes
        for x in told({FLEX: right}, monkeypatch)
        if isinstance(x, Result)
    }
    assert "1.00 x ours, 3 MiB more" in notes["cpu", "backward"]
    assert "3.00 x ours, 3 MiB more" in notes[FLEX, "forward"]  # 3 of 1
    assert "2.00 x ours, 3 MiB more" in notes[FLEX, "backward"]  # 4 of 2
    assert notes["FlexAttention's mask, eager", "once a batch"] == (
        "once a batch; with one forward 1.50 x ours and our segments"  # 3 + 6 of 1 + 5
        "; with one backward 1.43 x ours and our segments"  # 4 + 6 of 2 + 5
    )


@pytest.mark.parametrize(
    ("call", "raised"),
    [
        (lambda q, k, v, **_: 2 * right(q, k, v), pytest.raises(SystemExit, match="cpu: out is")),
        (lambda q, k, v, **_: refuses(q, k, v), pytest.raises(NotImplementedError)),
    ],
    ids=["wrong", "refuses"],
)
def test_what_is_wrong_with_ours_stops_the_run(
    device: list[int], monkeypatch: pytest.MonkeyPatch, call: Any, raised: Any
) -> None:
    monkeypatch.setattr(attention_gpu, "varlen_attention", call)
    with raised:
        list(told({}, monkeypatch))


def test_a_run_is_prepared_untimed_and_the_device_spins_while_it_is_launched(
    device: list[int],
) -> None:
    def ready() -> Callable[[], None]:
        time.sleep(0.01)
        return lambda: None

    spent = milliseconds(ready)
    assert len(spent) == 3
    assert max(spent) < 5
    assert device[0] == attention_gpu.CLOCK_HZ * 2 * attention_gpu.HOST_S  # how long is not known
    assert 0 < device[-1] < device[0]
    assert peak_bytes(ready) == 3 << 20


def test_a_flash_attn_is_told_to_be_absent_or_broken_and_given_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        asked.append(options)
        return right(q, k, v), None

    def load(name: str) -> object:
        if name == "flash_attn":
            return SimpleNamespace(flash_attn_varlen_func=varlen)
        raise OSError(f"no {name}.so")

    monkeypatch.setattr(attention_gpu_peers.importlib, "import_module", load)
    here, absent = flashes()
    assert [line.partition(":")[0] for line in absent] == [
        "FlashAttention-4", "FlashAttention-3", "FlashAttention-3 of fa3-fwd"
    ]  # fmt: skip
    assert absent[0] == "FlashAttention-4: skipped: OSError: no flash_attn.cute.so"
    q, k, v, _ = inputs(SHAPE)
    made = attention_gpu_peers.peers(SHAPE, CPU, here)
    for name, deterministic in (("", False), (", deterministic", True)):
        assert torch.equal(made[f"FlashAttention-2{name}"]()(q, k, v), right(q, k, v))
        options = asked.pop()
        assert options.pop("cu_seqlens_q").tolist() == [0, 40, 64]
        assert options.pop("cu_seqlens_k").dtype == torch.int32
        assert options == {
            "max_seqlen_q": 40, "max_seqlen_k": 40, "softmax_scale": 0.125, "causal": True,
            "deterministic": deterministic,
        }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # torch's own code
def test_flex_and_its_mask_are_compiled_once_for_all_packings_of_one_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    try:
        for lengths in [(300, 212), (500, 1, 11), (512,)]:
            shape = Shape("", lengths, (4, 2), 64, torch.float32)
            q, k, v, _ = (x.detach() for x in inputs(shape))
            out = flex(shape, CPU)(q, k, v)
            mask = compiled_mask()(sees(shape, "cpu"), None, None, 512, 512, device="cpu")
            torch.testing.assert_close(out, loop(q, k, v, lengths))
            assert mask.shape == (1, 1, 512, 512)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    finally:
        for made in (compiled_flex, compiled_mask):
            made.cache_clear()
        torch._dynamo.reset()


def test_json_names_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = attention_gpu.told_as("attention forward", SHAPE, "triton", [1.0], "")
    assert "gpu" not in harness.machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    harness.tell(iter([result]), as_json=True)
    assert json.loads(capsys.readouterr().out)["gpu"] == "NVIDIA H100 80GB HBM3"
