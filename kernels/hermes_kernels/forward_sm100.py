"""The forward of `varlen_attention` for Blackwell (sm_100), in Gluon: each warp has one role.

A program has two query tiles of M = 128 with the same keys: two heads of a group, or, for the last
head of an odd group, two tiles that follow one another. While the tensor cores work for one tile,
the other's weights are made. With P the weights, S the scores and O the output in tensor memory:

    load       q, then a ring of key and value blocks, by TMA       warp 13
    multiply   S = q @ k', O += P @ v                               warp 12
    softmax    P = exp2(S - top), its sum, the logarithm            warps 4-7, 8-11: a tile each
    correct    O *= shrink, where the maximum moved; out = O / sum  warps 0-3

Barriers stand between them: ``x_ready`` says that x may be read, ``x_free`` that it may be
overwritten, with a for what O is to shrink by. S and P share their columns: what writes S next is
asked for after what reads P, and the tensor cores keep that order.

As in FlashAttention-4 (arXiv 2603.05451), the maximum is taken over only where it has grown by more
than 2^8, so that O is seldom scaled again; every eighth exponential is a polynomial; and products
begin when half of the weights are there. Blocks are counted from each segment's start and come in
rising order (`walk.part`); the first, which all queries of a tile see whole, need no mask. A masked
weight is exactly 0 and moves no maximum; each row decides by itself when to take its own over, and
one that does not is scaled by 1: neither its neighbours nor its place change any of its bits.

This kernel has never run on a GPU. Its machine code is checked as that of the others
(`python -m bench attention --static`), and its own source is run by a simulator that lets copies,
products and roles go on in any order and refuses races (tests/kernels/test_forward_sm100.py).

Shapes: T packed tokens, N query heads, K key heads, G = N / K, H head size, U = T rounded up to
M, M queries of a tile and J keys of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    float2,
    mbarrier,
    tcgen05_mma,
    tma,
)
from triton.experimental.gluon.nvidia.blackwell import TensorDescriptor

from hermes_kernels.launch import TILE, launch_of, on, room_for
from hermes_kernels.places import Places
from hermes_kernels.softmax_sm100 import pairs, row_a_thread, softmax, weights_in
from hermes_kernels.walk import back, part

LOG2E = gl.constexpr(1.4426950408889634)
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# Of the first role, and registers of a thread: all have these at the start, and give or take when
# the roles begin.
WARPS = 4
REGISTERS = 128
SOFTMAX_REGISTERS = gl.constexpr(192)
OTHER_REGISTERS = gl.constexpr(40)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q, kv, q_ready, kv_ready, kv_free, row, down, head, across, first,
    after, rest, count, blocks, G: gl.constexpr,
):  # fmt: skip
    """q, then each block of keys and of values, in turn."""
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    for x in gl.static_range(2):
        mbarrier.expect(q_ready.index(x), q_desc.block_type.nbytes)
        at = [row + x * down, (head + x * across) * H]
        tma.async_copy_global_to_shared(q_desc, at, q_ready.index(x), q.index(x))
    for i in range(count):
        n, _ = part(i, first, after, rest, blocks, J)
        at = [n, head // G * H]
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
def _multiply(q, kv, s, o, q_ready, kv_ready, kv_free, s_ready, p_ready, o_ready, o_scaled, count):
    """Every product: a tile's next scores are asked for as soon as its output is."""
    STAGES: gl.constexpr = kv.shape[0]
    mbarrier.wait(kv_ready.index(0), 0)
    k = kv.index(0).permute((1, 0))
    mbarrier.wait(q_ready.index(0), 0)
    tcgen05_mma(q.index(0), k, s[0], use_acc=False, mbarriers=[s_ready.index(0)])
    mbarrier.wait(q_ready.index(1), 0)
    tcgen05_mma(q.index(1), k, s[1], use_acc=False, mbarriers=[s_ready.index(1), kv_free.index(0)])
    for i in range(count - 1):
        # Always 0, which the compiler does not know: addresses of q that it took out of the loop
        # would need more uniform registers than there are, and what all roles share be spilled.
        zero = i >> 30
        j = 2 * i + 1
        here, after = j % STAGES, (j + 1) % STAGES
        v, k = kv.index(here), kv.index(after).permute((1, 0))
        mbarrier.wait(kv_ready.index(here), j // STAGES & 1)
        _add(0, v, s, o, p_ready, o_scaled, i, [o_ready.index(0)])
        mbarrier.wait(kv_ready.index(after), (j + 1) // STAGES & 1)
        tcgen05_mma(q.index(zero), k, s[0], use_acc=False, mbarriers=[s_ready.index(0)])
        done = [o_ready.index(1), kv_free.index(here)]
        _add(1, v, s, o, p_ready, o_scaled, i, done)
        done = [s_ready.index(1), kv_free.index(after)]
        tcgen05_mma(q.index(zero + 1), k, s[1], use_acc=False, mbarriers=done)
    i = count - 1
    j = 2 * i + 1
    v = kv.index(j % STAGES)
    mbarrier.wait(kv_ready.index(j % STAGES), j // STAGES & 1)
    for x in gl.static_range(2):
        _add(x, v, s, o, p_ready, o_scaled, i, [o_ready.index(x)])


@gluon.jit
def _add(x: gl.constexpr, v, s, o, p_ready, o_scaled, i, done):
    """O += P @ v of tile x for the i-th block, in halves: each once its weights are there."""
    HALF: gl.constexpr = v.shape[0] // 2
    p = weights_in(s[x], v.dtype)
    mbarrier.wait(o_scaled.index(x), i & 1)
    mbarrier.wait(p_ready.index(2 * x), i & 1)
    tcgen05_mma(p.slice(0, HALF), v.slice(0, HALF), o[x], use_acc=i > 0)
    mbarrier.wait(p_ready.index(2 * x + 1), i & 1)
    tcgen05_mma(p.slice(HALF, HALF), v.slice(HALF, HALF), o[x], use_acc=True, mbarriers=done)


@gluon.jit
def _correct(
    out_desc, q, shrinks, o, o_ready, o_scaled, a_ready, a_free, row, down, head, across, count
):
    """O scaled before each block is added to it; the output, which leaves by way of q's place."""
    M: gl.constexpr = o[0].shape[0]
    H: gl.constexpr = o[0].shape[1]
    for x in gl.static_range(2):
        mbarrier.wait(a_ready.index(x), 0)  # the first block has nothing to shrink
        mbarrier.arrive(a_free.index(x))
        mbarrier.arrive(o_scaled.index(x))
    strip: gl.constexpr = row_a_thread(M, 32)
    # Every warp reads all rows: asking the others takes longer, and a register of every role.
    whole: gl.constexpr = gl.BlockedLayout([M // 32], [32], [4], [0])
    for i in range(1, count):
        for x in gl.static_range(2):
            mbarrier.wait(a_ready.index(x), i & 1)
            shrink = shrinks.index(x).load(gl.SliceLayout(1, strip))
            least = gl.min(shrinks.index(x).load(whole), 0)
            mbarrier.arrive(a_free.index(x))
            mbarrier.wait(o_ready.index(x), (i & 1) ^ 1)
            if least < 1:
                for c in gl.static_range(H // 32):
                    columns = o[x].slice(c * 32, 32)
                    scaled = float2.pack(columns.load(strip), 1) * pairs(shrink, 32)
                    columns.store(float2.unpack(scaled, 1))
            mbarrier.arrive(o_scaled.index(x))
    half: gl.constexpr = row_a_thread(M, 64)
    for x in gl.static_range(2):
        mbarrier.wait(a_ready.index(x), count & 1)
        inverse = shrinks.index(x).load(gl.SliceLayout(1, half))[:, None]
        mbarrier.wait(o_ready.index(x), (count & 1) ^ 1)
        for c in gl.static_range(H // 64):
            out = o[x].slice(c * 64, 64).load(half) * inverse
            q.index(x).slice(c * 64, 64, 1).store(out.to(q.dtype))
        fence_async_shared()
        at = [row + x * down, (head + x * across) * H]
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
    q_desc, k_desc, v_desc, out_desc, lse_ptr, starts, ends, block_of, blocks, order, scale, T, U,
    G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out and lse of two query tiles: the second is a head or a tile after the first.

    Grid (K * ceil(G / 2), U / M).
    """
    M: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    PAIRS: gl.constexpr = (G + 1) // 2
    dtype: gl.constexpr = q_desc.dtype
    pair = gl.program_id(0)
    head = pair // PAIRS * G + pair % PAIRS * 2
    tile = gl.load(order + gl.program_id(1))
    down, across = 0, 1
    if G % 2 == 1:
        if pair % PAIRS == PAIRS - 1:
            if tile % 2 == 1:
                return  # the tile before has it
            down, across = M, 0
    row = tile * M
    first, after, rest, count, _ = back(row, starts, ends, block_of, blocks, T, M + down, J)

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
    s_ready, p_ready, o_ready = _barriers(2), _barriers(4), _barriers(2)
    o_scaled, a_ready, a_free = _barriers(2), _barriers(2), _barriers(2)
    scale *= LOG2E
    lse_ptr += head.to(gl.int64) * U
    gl.warp_specialize(
        [
            (_correct, (
                out_desc, q, shrinks, (o0, o1), o_ready, o_scaled, a_ready, a_free, row, down,
                head, across, count,
            )),
            (softmax, (
                0, s0, shrinks.index(0), s_ready.index(0), p_ready, a_ready.index(0),
                a_free.index(0), lse_ptr, starts, blocks, scale, row, down, first, after,
                rest, count, T, U, dtype,
            )),
            (softmax, (
                1, s1, shrinks.index(1), s_ready.index(1), p_ready, a_ready.index(1),
                a_free.index(1), lse_ptr + U * across, starts, blocks, scale, row, down, first,
                after, rest, count, T, U, dtype,
            )),
            (_multiply, (
                q, kv, (s0, s1), (o0, o1), q_ready, kv_ready, kv_free, s_ready, p_ready, o_ready,
                o_scaled, count,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q, kv, q_ready, kv_ready, kv_free, row, down, head,
                across, first, after, rest, count, blocks, G,
            )),
        ],
        [4, 4, 1, 1],
        [SOFTMAX_REGISTERS, SOFTMAX_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip


def forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, places: Places, scale: float
) -> tuple[Tensor, Tensor]:
    """As `varlen_attention.forward`, for head sizes of 64 and 128, on a GPU of sm_100."""
    tokens, heads, size = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    group = heads // kv_heads
    out = torch.empty_like(q_TNH)
    lse = q_TNH.new_empty(
        heads, room_for(heads, tokens, places.query_order.numel()), dtype=torch.float32
    )
    boxes = (_boxes(x) for x in (q_TNH, k_TKH, v_TKH, out))
    with on(q_TNH):
        pair_kernel[kv_heads * -(-group // 2), places.query_order.numel()](
            *boxes, lse, *places[:4], places.query_order, scale, tokens, lse.shape[1], group,
            launch_of(100, "pairs", size).stages, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return out, lse


def _boxes(x_TNH: Tensor) -> TensorDescriptor:
    block = [TILE, x_TNH.shape[2]]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[x_TNH.dtype])
    return TensorDescriptor.from_tensor(x_TNH.flatten(1), block, layout)
