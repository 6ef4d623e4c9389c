"""The forward of `varlen_attention` for Blackwell (sm_100), in Gluon: each warp has one role.

A program has two query tiles of M = 128 with the same keys: two heads of a group, or, where a group
is odd, two tiles of a head that follow one another. While the tensor cores work for one tile, the
other's weights are made. With P the weights, S the scores and O the output in tensor memory:

    load       q, then a ring of key and value blocks, by TMA       warp 13
    multiply   S = q @ k', O += P @ v                               warp 12
    softmax    P = exp2(S - top), its sum, the logarithm            warps 4-7, 8-11: a tile each
    correct    O *= shrink, where the maximum moved; out = O / sum  warps 0-3

Barriers stand between them: ``x_ready`` says that x may be read, ``x_free`` that it may be
overwritten. S and P share their columns: what writes S next is issued after what reads P, and the
tensor cores keep that order.

As in FlashAttention-4 (arXiv 2603.05451), the maximum is taken over only where it has grown by more
than 2^8, so that O is seldom scaled again, and every eighth exponential is a polynomial. A block is
masked only at a border: blocks on the diagonal come first, then from the first that is seen on, so
that those to be masked are together. A masked weight is exactly 0; equal inputs give equal bits.

This kernel has never run on a GPU. Its machine code is checked as that of the others
(`python -m bench attention --static`), and its own source is run by a simulator that lets copies,
products and roles go on in any order and refuses races (tests/kernels/test_forward_sm100.py).

Shapes: T packed tokens, N query heads, K key heads, G = N / K, H head size, U = T rounded up to
M, M queries of a tile and J keys of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    float2,
    get_tmem_reg_layout,
    mbarrier,
    tcgen05_mma,
    tma,
)
from triton.experimental.gluon.nvidia.blackwell import TensorDescriptor

from hermes_kernels.launch import TILE

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# A first maximum that is finite, so that a block masked whole adds exp2(-inf) = 0 and no NaN.
LEAST = gl.constexpr(-1e30)
# By how much, as a power of two, weights may pass 1 before the maximum is taken over.
SLACK = gl.constexpr(8.0)

TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# Of the first role, and registers of a thread: all have these at the start, and give or take when
# the roles begin.
WARPS = 4
REGISTERS = 128
SOFTMAX_REGISTERS = gl.constexpr(192)
OTHER_REGISTERS = gl.constexpr(40)

# Scores are loaded, and weights stored, in strips of columns: as many as fit into registers.
STRIPS = gl.constexpr(5)
# -inf instead of the scores whose bit is not set. By hand: from `gl.where` LLVM packs the bits of a
# strip anew, at a third of a masked block's time.
MASK = gl.constexpr(
    """{
    .reg .pred seen;
    .reg .b32 bit;
    and.b32 bit, $2, $3;
    setp.ne.b32 seen, bit, 0;
    selp.b32 $0, $1, 0xFF800000, seen;
}"""
)
# 2^x on [-1/2, 1/2] as 1 + C1 x + ... + C4 x^4, off by at most 2.9e-6 of its value.
C1, C2 = gl.constexpr(0.6931241750717163), gl.constexpr(0.24024099111557007)
C3, C4 = gl.constexpr(0.05590646341443062), gl.constexpr(0.009582862257957458)
# Added to a float32, it leaves the nearest integer in the lowest bits.
ROUND = gl.constexpr(12582912.0)
LOWEST = gl.constexpr(-127.0)  # 2^-127 has the bits of 0


@gluon.constexpr_function
def left(strip):
    """First column of a strip; the last is half a strip, whose powers are polynomials."""
    return (0, 32, 64, 96, 112)[strip]


@gluon.constexpr_function
def width(strip):
    return (32, 32, 32, 16, 16)[strip]


@gluon.constexpr_function
def row_a_thread(rows, columns):
    """How four warps hold a part of tensor memory: each thread one row."""
    part = TensorMemoryLayout((rows, columns), col_stride=1)
    return get_tmem_reg_layout(gl.float32, (rows, columns), part, 4)


@gluon.jit
def _block(i, row, first, DOWN: gl.constexpr, J: gl.constexpr):
    """First key of the i-th block: those of the diagonal, from the last, then from ``first``."""
    diagonal: gl.constexpr = 1 + DOWN // J
    return gl.where(i < diagonal, row + DOWN - i * J, first + (i - diagonal) * J)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q, kv, q_ready, kv_ready, kv_free, row, head, first, blocks,
    G: gl.constexpr, DOWN: gl.constexpr, ACROSS: gl.constexpr,
):  # fmt: skip
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    for x in gl.static_range(2):
        mbarrier.expect(q_ready.index(x), q_desc.block_type.nbytes)
        at = [row + x * DOWN, (head + x * ACROSS) * H]
        tma.async_copy_global_to_shared(q_desc, at, q_ready.index(x), q.index(x))
    for i in range(blocks):
        at = [_block(i, row, first, DOWN, J), head // G * H]
        _fetch(k_desc, at, kv, kv_ready, kv_free, 2 * i)
        _fetch(v_desc, at, kv, kv_ready, kv_free, 2 * i + 1)


@gluon.jit
def _fetch(desc, at, kv, kv_ready, kv_free, i):
    """The i-th block of keys or values into its place in the ring."""
    STAGES: gl.constexpr = kv.shape[0]
    slot, lap = i % STAGES, i // STAGES & 1
    mbarrier.wait(kv_free.index(slot), lap ^ 1)
    mbarrier.expect(kv_ready.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, at, kv_ready.index(slot), kv.index(slot))


@gluon.jit
def _weights(s, dtype: gl.constexpr):
    """P: [M, J] of ``dtype`` in the first columns of S."""
    M: gl.constexpr = s.shape[0]
    J: gl.constexpr = s.shape[1]
    whole: gl.constexpr = TensorMemoryLayout((M, J), col_stride=1)
    return s._reinterpret(dtype, [M, 2 * J], whole).slice(0, J)


@gluon.jit
def _multiply(
    q, kv, s, o, q_ready, kv_ready, kv_free, s_ready, p_ready, o_ready, o_scaled, blocks
):
    STAGES: gl.constexpr = kv.shape[0]
    mbarrier.wait(kv_ready.index(0), 0)
    k = kv.index(0).permute((1, 0))
    mbarrier.wait(q_ready.index(0), 0)
    tcgen05_mma(q.index(0), k, s[0], use_acc=False, mbarriers=[s_ready.index(0)])
    mbarrier.wait(q_ready.index(1), 0)
    tcgen05_mma(q.index(1), k, s[1], use_acc=False, mbarriers=[s_ready.index(1), kv_free.index(0)])
    for i in range(blocks - 1):
        j = 2 * i + 1
        here, after = j % STAGES, (j + 1) % STAGES
        v, k = kv.index(here), kv.index(after).permute((1, 0))
        mbarrier.wait(kv_ready.index(here), j // STAGES & 1)
        _add(v, s[0], o[0], p_ready.index(0), o_scaled.index(0), i, [o_ready.index(0)])
        mbarrier.wait(kv_ready.index(after), (j + 1) // STAGES & 1)
        tcgen05_mma(q.index(0), k, s[0], use_acc=False, mbarriers=[s_ready.index(0)])
        done = [o_ready.index(1), kv_free.index(here)]
        _add(v, s[1], o[1], p_ready.index(1), o_scaled.index(1), i, done)
        done = [s_ready.index(1), kv_free.index(after)]
        tcgen05_mma(q.index(1), k, s[1], use_acc=False, mbarriers=done)
    i = blocks - 1
    j = 2 * i + 1
    v = kv.index(j % STAGES)
    mbarrier.wait(kv_ready.index(j % STAGES), j // STAGES & 1)
    for x in gl.static_range(2):
        _add(v, s[x], o[x], p_ready.index(x), o_scaled.index(x), i, [o_ready.index(x)])


@gluon.jit
def _add(v, s, o, p_ready, o_scaled, i, done):
    """O += P @ v for the i-th block, once its weights are there and O is scaled for them."""
    mbarrier.wait(p_ready, i & 1)
    mbarrier.wait(o_scaled, i & 1)
    tcgen05_mma(_weights(s, v.dtype), v, o, use_acc=i > 0, mbarriers=done)


@gluon.jit
def _softmax(
    s, shrinks, s_ready, p_ready, a_ready, a_free, lse_ptr, starts, scale, row, down, first, T, U,
    dtype: gl.constexpr, DOWN: gl.constexpr,
):  # fmt: skip
    """The weights of one tile, which begins at token row + down, and its log-sum-exp."""
    M: gl.constexpr = s.shape[0]
    J: gl.constexpr = s.shape[1]
    rows: gl.constexpr = gl.SliceLayout(1, row_a_thread(M, 32))
    t = row + down + gl.arange(0, M, rows)  # [M]
    start = gl.load(starts + gl.minimum(t, T - 1))
    last_start = gl.load(starts + gl.minimum(row + down + M, T) - 1)
    past = gl.minimum(gl.cdiv(last_start - first, J), (row - first) // J)
    borders = 1 + DOWN // J + past
    blocks = 1 + (row + DOWN - first) // J
    top = gl.full([M], LEAST, gl.float32, rows)
    total = gl.full([M], 0.0, gl.float32, rows)
    for i in range(borders):
        mbarrier.wait(s_ready, i & 1)
        n = _block(i, row, first, DOWN, J)
        strips = _masked(_scores(s), start - n, t - n)
        top, total = _weigh(
            strips, s, shrinks, p_ready, a_ready, a_free, top, total, i, scale, dtype
        )
    for i in range(borders, blocks):
        mbarrier.wait(s_ready, i & 1)
        strips = _scores(s)
        top, total = _weigh(
            strips, s, shrinks, p_ready, a_ready, a_free, top, total, i, scale, dtype
        )
    mbarrier.wait(a_free, (blocks & 1) ^ 1)
    shrinks.store(1 / total)
    mbarrier.arrive(a_ready)
    gl.store(lse_ptr + t, (top + gl.log2(total)) * LN2, mask=t < U)


@gluon.jit
def _weigh(
    strips, s, shrinks, p_ready, a_ready, a_free, top, total, i, scale, dtype: gl.constexpr
):
    """P of one block from its scores, and the new maximum and sum of each row."""
    rows: gl.constexpr = gl.SliceLayout(1, row_a_thread(s.shape[0], 32))
    new_top = top
    for c in gl.static_range(STRIPS):
        highest = gl.convert_layout(gl.max(strips[c], 1), rows)
        new_top = gl.maximum(new_top, highest * scale)
    new_top = gl.where(new_top - top > SLACK, new_top, top)
    shrink = gl.exp2(top - new_top)
    mbarrier.wait(a_free, (i & 1) ^ 1)
    shrinks.store(shrink)
    mbarrier.arrive(a_ready)
    total = total * shrink
    p = _weights(s, dtype)
    for c in gl.static_range(STRIPS):
        x = float2.pack(strips[c], 1)
        x = float2.fma(x, float2.full_like(x, scale), _pairs(-new_top, width(c)))
        weights = _power(x) if c == STRIPS - 1 else gl.exp2(float2.unpack(x, 1))
        p.slice(left(c), width(c)).store(weights.to(dtype))
        even, odd = float2.unpack2(float2.pack(weights, 1).sum(1))
        total = total + gl.convert_layout(even + odd, rows)
    mbarrier.arrive(p_ready)
    return new_top, total


@gluon.jit
def _scores(s):
    """S in strips."""
    strips = ()
    for c in gl.static_range(STRIPS):
        strip = s.slice(left(c), width(c)).load(row_a_thread(s.shape[0], width(c)))
        strips = strips + (strip,)
    return strips


@gluon.jit
def _masked(strips, low, high):
    """Scores in columns from ``low`` to ``high``, which are [M]; the others are -inf."""
    kept = ()
    for c in gl.static_range(STRIPS):
        kept = kept + (_masked_strip(strips[c], low - left(c), high - left(c)),)
    return kept


@gluon.jit
def _masked_strip(strip, low, high):
    M: gl.constexpr = strip.shape[0]
    COLUMNS: gl.constexpr = strip.shape[1]
    layout: gl.constexpr = row_a_thread(M, COLUMNS)
    # Of 32 columns, a bit for each that is seen.
    bits = ((2 << gl.minimum(high, 31)) - 1) & (-1 << gl.maximum(low, 0))
    bits = gl.where((high >= 0) & (low <= 31), bits, 0)
    seen = gl.convert_layout(bits, gl.SliceLayout(1, layout))[:, None]
    bit = (1 << gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)))[None, :]
    return gl.inline_asm_elementwise(
        MASK, "=r,r,r,r", [strip, seen, bit], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _pairs(x, COLUMNS: gl.constexpr):
    """[M] as [M, COLUMNS], two columns to a register pair."""
    layout: gl.constexpr = row_a_thread(x.shape[0], COLUMNS)
    x = gl.convert_layout(x, gl.SliceLayout(1, layout))
    return float2.pack(x[:, None].broadcast_to(x.shape[0], COLUMNS), 1)


@gluon.jit
def _power(x):
    """2^x by a polynomial: what float units do while the one that knows exponentials is busy."""
    # NaN stays NaN or becomes infinite; it must not become a weight of 0.
    x = gl.maximum(float2.unpack(x, 1), LOWEST, propagate_nan=tl.PropagateNan.ALL)
    x = float2.pack(x, 1)
    round = float2.full_like(x, gl.to_tensor(ROUND))
    shifted = x + round
    rest = x - (shifted - round)
    power = float2.full_like(x, gl.to_tensor(C4))
    power = float2.fma(power, rest, float2.full_like(x, gl.to_tensor(C3)))
    power = float2.fma(power, rest, float2.full_like(x, gl.to_tensor(C2)))
    power = float2.fma(power, rest, float2.full_like(x, gl.to_tensor(C1)))
    power = float2.fma(power, rest, float2.full_like(x, gl.to_tensor(1.0)))
    exponent = float2.unpack(shifted, 1).to(gl.int32, bitcast=True) << 23
    bits = float2.unpack(power, 1).to(gl.int32, bitcast=True) + exponent
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _correct(
    out_desc, q, shrinks, o, o_ready, o_scaled, a_ready, a_free, row, head, blocks,
    DOWN: gl.constexpr, ACROSS: gl.constexpr,
):  # fmt: skip
    """O scaled before each block is added to it, and the output, which leaves by way of q's place."""
    M: gl.constexpr = o[0].shape[0]
    H: gl.constexpr = o[0].shape[1]
    for x in gl.static_range(2):
        mbarrier.wait(a_ready.index(x), 0)  # the first block has nothing to shrink
        mbarrier.arrive(a_free.index(x))
        mbarrier.arrive(o_scaled.index(x))
    strip: gl.constexpr = row_a_thread(M, 32)
    for i in range(1, blocks):
        for x in gl.static_range(2):
            mbarrier.wait(a_ready.index(x), i & 1)
            shrink = shrinks.index(x).load(gl.SliceLayout(1, strip))
            mbarrier.arrive(a_free.index(x))
            mbarrier.wait(o_ready.index(x), (i & 1) ^ 1)
            if gl.min(shrink, 0) < 1:
                for c in gl.static_range(H // 32):
                    part = o[x].slice(c * 32, 32)
                    scaled = float2.pack(part.load(strip), 1) * _pairs(shrink, 32)
                    part.store(float2.unpack(scaled, 1))
            mbarrier.arrive(o_scaled.index(x))
    half: gl.constexpr = row_a_thread(M, 64)
    for x in gl.static_range(2):
        mbarrier.wait(a_ready.index(x), blocks & 1)
        inverse = shrinks.index(x).load(gl.SliceLayout(1, half))[:, None]
        mbarrier.wait(o_ready.index(x), (blocks & 1) ^ 1)
        for c in gl.static_range(H // 64):
            out = o[x].slice(c * 64, 64).load(half) * inverse
            q.index(x).slice(c * 64, 64, 1).store(out.to(q.dtype))
        fence_async_shared()
        at = [row + x * DOWN, (head + x * ACROSS) * H]
        tma.async_copy_shared_to_global(out_desc, at, q.index(x))
    tma.store_wait(0)


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    """So many barriers, each of one arrival a phase."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def pair_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, starts, order, scale, T, U,
    G: gl.constexpr, DOWN: gl.constexpr, ACROSS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out and lse of two query tiles: the second is DOWN tokens and ACROSS heads after the first.

    Grid (N / (1 + ACROSS), U / M).
    """
    M: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    dtype: gl.constexpr = q_desc.dtype
    head = gl.program_id(0) * (1 + ACROSS)
    tile = gl.load(order + gl.program_id(1))
    if DOWN > 0:
        if tile % 2 == 1:
            return  # the tile before has it
    row = tile * M
    first = gl.load(starts + row) // J * J
    blocks = 1 + (row + DOWN - first) // J

    q = gl.allocate_shared_memory(dtype, [2, M, H], q_desc.layout)
    kv = gl.allocate_shared_memory(dtype, [STAGES, J, H], k_desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    shrinks = gl.allocate_shared_memory(gl.float32, [2, M], plain)
    in_s: gl.constexpr = TensorMemoryLayout((M, J), col_stride=1)
    in_o: gl.constexpr = TensorMemoryLayout((M, H), col_stride=1)
    s0 = allocate_tensor_memory(gl.float32, [M, J], in_s)
    s1 = allocate_tensor_memory(gl.float32, [M, J], in_s)
    o0 = allocate_tensor_memory(gl.float32, [M, H], in_o)
    o1 = allocate_tensor_memory(gl.float32, [M, H], in_o)
    q_ready, kv_ready, kv_free = _barriers(2), _barriers(STAGES), _barriers(STAGES)
    s_ready, p_ready, o_ready = _barriers(2), _barriers(2), _barriers(2)
    o_scaled, a_ready, a_free = _barriers(2), _barriers(2), _barriers(2)
    scale *= LOG2E
    lse_ptr += head.to(gl.int64) * U
    gl.warp_specialize(
        [
            (_correct, (
                out_desc, q, shrinks, (o0, o1), o_ready, o_scaled, a_ready, a_free, row, head,
                blocks, DOWN, ACROSS,
            )),
            (_softmax, (
                s0, shrinks.index(0), s_ready.index(0), p_ready.index(0), a_ready.index(0),
                a_free.index(0), lse_ptr, starts, scale, row, 0, first, T, U, dtype, DOWN,
            )),
            (_softmax, (
                s1, shrinks.index(1), s_ready.index(1), p_ready.index(1), a_ready.index(1),
                a_free.index(1), lse_ptr + U * ACROSS, starts, scale, row, DOWN, first, T, U,
                dtype, DOWN,
            )),
            (_multiply, (
                q, kv, (s0, s1), (o0, o1), q_ready, kv_ready, kv_free, s_ready, p_ready, o_ready,
                o_scaled, blocks,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q, kv, q_ready, kv_ready, kv_free, row, head, first,
                blocks, G, DOWN, ACROSS,
            )),
        ],
        [4, 4, 1, 1],
        [SOFTMAX_REGISTERS, SOFTMAX_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip


def forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor, lse_NU: Tensor,
    starts_T: Tensor, order: Tensor, scale: float, *, stages: int,
) -> None:  # fmt: skip
    """Write ``out_TNH`` and ``lse_NU``; the others are those of `varlen_attention.forward`.

    Args:
        stages: places for blocks of keys or values in shared memory.
    """
    tokens, heads, _ = q_TNH.shape
    group = heads // k_TKH.shape[1]
    down, across = steps_of(group)
    boxes = (_boxes(x) for x in (q_TNH, k_TKH, v_TKH, out_TNH))
    pair_kernel[heads // (1 + across), order.numel()](
        *boxes, lse_NU, starts_T, order, scale, tokens, lse_NU.shape[1],
        group, down, across, stages, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip


def steps_of(group: int) -> tuple[int, int]:
    """Tokens and heads from a program's first tile to its second, for G query heads a key head."""
    return (0, 1) if group % 2 == 0 else (TILE, 0)


def _boxes(x_TNH: Tensor) -> TensorDescriptor:
    block = [TILE, x_TNH.shape[2]]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[x_TNH.dtype])
    return TensorDescriptor.from_tensor(x_TNH.flatten(1), block, layout)
