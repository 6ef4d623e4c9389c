"""The loss on a GPU, at real vocabularies: `TRITON_INTERPRET=0 pytest -m gpu tests/kernels`.

`test_cross_entropy.py` runs there too, without `-m gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hermes_core.loss import Backend, linear_cross_entropy, masked_cross_entropy, token_nll
from hermes_core.loss_head import LossHead
from hermes_kernels import cross_entropy, cross_entropy_held
from hermes_kernels.launch import GLUON_SINCE, TRITON_VERSION, architecture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(60),
]
IGNORE = -100
TOKENS, SIZE = 3_000, 1_024
LLAMA, QWEN, ODD = 128_256, 151_936, 32_001
HOLDS = (
    torch.cuda.is_available()
    and TRITON_VERSION >= GLUON_SINCE
    and architecture(torch.device("cuda")) in (90, 100)
)
OPTIONS: dict[str, dict[str, float]] = {
    "none": {},
    "one": {"z_loss": 1e-4},
    "30 %": {"z_loss": 1e-4, "softcap": 30.0, "denominator": 700.5},
    # More rows than one chunk may have: the weight's gradient is a sum in fp32.
    "all": {"chunk_bytes": 2**26, "denominator": TOKENS},
}


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def problem(
    vocabulary: int, kept: str = "30 %", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    hidden = normal(TOKENS, SIZE).to(dtype).requires_grad_()
    weight = (0.05 * normal(vocabulary, SIZE)).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (TOKENS,), generator=generator, device="cuda")
    drawn = torch.rand(TOKENS, generator=generator, device="cuda")
    share = {"none": 0.0, "one": 0.0, "30 %": 0.3, "all": 1.0}[kept]
    dropped = drawn >= share
    if kept == "one":
        dropped[TOKENS - 2] = False
    return hidden, weight, labels.masked_fill_(dropped, IGNORE)


def run(
    given: tuple[Tensor, Tensor, Tensor], backend: Backend = "triton", **options: object
) -> list[Tensor]:
    """Total and the gradients of hidden and weight."""
    loss = linear_cross_entropy(*given, backend=backend, **options)  # type: ignore[arg-type]
    return [loss.total.detach(), *torch.autograd.grad(loss.total, given[:2])]


def truth(
    given: tuple[Tensor, Tensor, Tensor], token_weights: Tensor, *, z_loss: float = 0.0,
    softcap: float = 0.0, denominator: float = 1.0, chunk_bytes: int = 0,
) -> list[Tensor]:  # fmt: skip
    """The same in float64, some rows at a time."""
    hidden, weight, labels = (x.detach() for x in given)
    wide = weight.double()
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    d_hidden, d_weight = (
        hidden.new_zeros(hidden.shape, dtype=torch.float64),
        wide.new_zeros(wide.shape),
    )
    for at in (labels != IGNORE).nonzero().squeeze(1).split(256):
        h, y, w = hidden[at].double(), labels[at, None], token_weights[at, None].double()
        z = h @ wide.T
        if softcap:
            z = z.div_(softcap).tanh_().mul_(softcap)
        lse = z.logsumexp(1, keepdim=True)
        total += (w * (lse - z.gather(1, y) + z_loss * lse**2)).sum()
        gradient = (z - lse).exp_().mul_(w * (1 + 2 * z_loss * lse)).scatter_add_(1, y, -w)
        if softcap:
            gradient.mul_(z.div_(softcap).square_().neg_().add_(1))
        d_hidden[at] = gradient @ wide
        d_weight.addmm_(gradient.T, h)
    return [x.div_(denominator) for x in (total, d_hidden, d_weight)]


def assert_no_worse(ours: list[Tensor], plain: list[Tensor], right: list[Tensor]) -> None:
    for mine, theirs, true in zip(ours, plain, right, strict=True):
        assert mine.isfinite().all()
        error, allowed = (mine - true).norm(), 1.05 * (theirs - true).norm() + 2e-6 * true.norm()
        assert error <= allowed, f"{float(error)} is more than {float(allowed)}"


@pytest.mark.parametrize("vocabulary", [LLAMA, QWEN, ODD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kept", OPTIONS)
def test_errs_no_more_than_in_pytorch(vocabulary: int, dtype: torch.dtype, kept: str) -> None:
    given, options = problem(vocabulary, kept, dtype), OPTIONS[kept]
    token_weights = 0.5 + torch.arange(TOKENS, device="cuda") / TOKENS
    right = truth(given, token_weights, **options)  # type: ignore[arg-type]
    plain = run(given, "torch", token_weights_T=token_weights, **options)
    ours = run(given, "triton", token_weights_T=token_weights, **options)
    assert_no_worse(ours, plain, right)
    assert ours[1][given[2] == IGNORE].count_nonzero() == 0
    assert bool(ours[1].any()) == (kept != "none")


def test_twenty_runs_give_the_same_bits() -> None:
    given = problem(LLAMA, "all")
    first = run(given, **OPTIONS["all"])
    for _ in range(19):
        for one, other in zip(first, run(given, **OPTIONS["all"]), strict=True):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it finds not every wait
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    given = problem(LLAMA, "30 %", dtype)
    kept = (given[2] != IGNORE).nonzero().squeeze(1)
    count = torch.tensor(float(len(kept)), device="cuda")
    wanted = run(given, denominator=count)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(given, denominator=count, kept=kept)
        run(given, denominator=900.0, kept=kept, chunk_bytes=2**26)
        statistics = token_nll(*given, kept=kept, backend="triton")
        torch.autograd.grad(statistics.nll_T.sum() - statistics.entropy_T.sum(), given[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_the_compiler_takes_it_without_a_break() -> None:
    given = problem(LLAMA)

    def total(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels, denominator=900).total * 3

    def gradients(value: Tensor) -> list[Tensor]:
        return [value.detach(), *torch.autograd.grad(value, given[:2])]

    wanted = gradients(total(*given))
    found = gradients(torch.compile(total, fullgraph=True)(*given))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_label_outside_the_vocabulary_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HERMES_CORE_DEBUG", raising=False)
    hidden, weight, labels = problem(LLAMA)
    for wrong in (LLAMA, 2**40, -1):
        bad = labels.clone()
        bad[7] = wrong
        total, d_hidden, d_weight = run((hidden, weight, bad))
        assert total.isnan()
        assert d_hidden.isfinite().all()
        assert d_weight.isfinite().all()
    assert run((hidden, weight, labels))[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_into_rows_compile_nothing_again(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(LLAMA, "all", dtype)
    held = dtype == torch.bfloat16 and HOLDS
    kernel = cross_entropy_held.held_kernel if held else cross_entropy.loss_and_gradient_kernel
    row_bytes = dtype.itemsize * LLAMA
    run((hidden, weight, labels), chunk_bytes=row_bytes * 500)
    cached = kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cached)
    for chunk_rows in (501, 499, 250):
        run((hidden[:2_991], weight, labels[:2_991]), chunk_bytes=row_bytes * chunk_rows)
    assert len(cached) == before > 0


@pytest.mark.skipif(not HOLDS, reason="rows are held on sm_90 and sm_100")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("columns", [8_192, 8_193, ODD, 65_537, LLAMA, QWEN, 262_208])
def test_rows_held_equal_rows_read_twice(
    columns: int, cap: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator("cuda").manual_seed(columns)
    rows = 300  # more than multiprocessors, whose rows follow one another
    buffer = torch.full((rows, -(-columns // 16) * 16), torch.nan, device="cuda", dtype=dtype)
    logits = buffer[:, :columns].normal_(std=4, generator=generator)
    logits[0, 1:], logits[1, : columns - 1] = -torch.inf, -torch.inf
    column = torch.randint(columns, (rows,), generator=generator, device="cuda")
    column[:2], column[2::3] = torch.tensor([0, columns - 1]), -1
    weight = torch.rand(rows, generator=generator, device="cuda")
    plain = buffer.clone()[:, :columns]
    assert cross_entropy_held.takes(logits)
    found = cross_entropy.loss_and_gradient_(logits, column, weight, 1e-3, cap)
    monkeypatch.setattr(cross_entropy_held, "takes", lambda logits: False)
    wanted = cross_entropy.loss_and_gradient_(plain, column, weight, 1e-3, cap)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, plain, rtol=2**-7, atol=2e-7)
    assert buffer[:, columns:].isnan().all()


def statistics_of(given: tuple[Tensor, Tensor, Tensor], **options: object) -> list[Tensor]:
    found = token_nll(*given, backend="triton", **options)  # type: ignore[arg-type]
    return list(torch.autograd.grad(found.nll_T.sum(), given[:2]))


@pytest.mark.parametrize(
    ("kept", "dtype", "call", "sums"),
    [
        ("all", torch.bfloat16, run, True),
        ("all", torch.float16, run, True),
        ("all", torch.bfloat16, statistics_of, True),
        ("30 %", torch.bfloat16, run, False),  # all logits are one chunk
    ],
)
def test_a_chunk_and_the_sum_in_fp32_are_all_the_memory_there_is(
    kept: str, dtype: torch.dtype, call: Callable[..., list[Tensor]], sums: bool
) -> None:
    """Beside inputs and gradients."""
    given, chunk = problem(LLAMA, kept, dtype), 2**26
    room = chunk + 4 * LLAMA * SIZE if sums else 2 * LLAMA * 1_100
    options = {"denominator": TOKENS} if dtype == torch.float16 else {}
    call(given, chunk_bytes=chunk, **options)  # cuBLAS takes its own memory once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() + sum(x.nbytes for x in given[:2])
    found = call(given, chunk_bytes=chunk, **options)
    del found
    assert torch.cuda.max_memory_allocated() - before < room + 5e7


def test_token_statistics_err_no_more_than_in_pytorch() -> None:
    hidden, weight, labels = problem(LLAMA, "30 %")
    hidden, labels = hidden.detach()[:400], labels[:400]
    factor = 0.5 + torch.rand(400, generator=torch.Generator("cuda").manual_seed(0), device="cuda")

    def statistics(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        nll, entropy = token_nll(*leaves, labels, softcap=30.0, backend=backend)
        total = ((nll - 0.3 * entropy) * factor).sum()
        return [nll.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)]

    right = statistics(torch.float64, "reference")
    for dtype in (torch.bfloat16, torch.float32):
        ours = statistics(dtype, "triton")
        assert_no_worse(ours, statistics(dtype, "torch"), right)
        assert ours[2][labels == IGNORE].count_nonzero() == 0


def test_logits_past_two_to_the_31_elements_lose_right() -> None:
    rows = 16_800
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(rows, LLAMA, device="cuda", dtype=torch.bfloat16)
    logits.normal_(generator=generator).requires_grad_()
    assert logits.numel() > 2**31
    labels = torch.randint(LLAMA, (rows,), generator=generator, device="cuda")
    labels[1::2] = IGNORE
    loss = masked_cross_entropy(logits, labels, backend="triton")
    (gradient,) = torch.autograd.grad(loss.total, logits)
    assert int(loss.tokens) == rows // 2
    for at in (0, 1, 2, rows // 2, rows - 3, rows - 2, rows - 1):
        wanted = logits[at].detach().double().softmax(0)
        wanted[labels[at].clamp(min=0)] -= 1
        wanted *= labels[at] != IGNORE
        torch.testing.assert_close(gradient[at].double(), wanted, rtol=2**-7, atol=1e-9)


def test_the_head_gives_the_loss_of_its_weight() -> None:
    hidden, weight, labels = problem(QWEN)
    head = LossHead(SIZE, QWEN, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(weight)
    loss = head(hidden.unflatten(0, (3, -1)), labels.unflatten(0, (3, -1)), denominator=900)
    found = [loss.total.detach(), *torch.autograd.grad(loss.total, (hidden, head.weight))]
    wanted = run((hidden, weight, labels), denominator=900)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
