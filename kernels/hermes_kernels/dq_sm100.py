"""dq of `varlen_attention` for Blackwell (sm_100), in Gluon: each warp has one role.

A program has a tile of M queries of one head and walks over the blocks of J keys that it sees:

    S = q @ k'      P = exp2(scale * S + exponent)
    R = dout @ v'   Z = P * (R - delta)           dq += Z @ k

q and dout lie in tensor memory, so that every product takes one operand from there and one from
shared memory, whose traffic would bound them otherwise; with S, R and dq they fill it. Z lies in
the columns of R, and S is free for the next block once it is in registers.

    load       q and dout, then a ring of key and value blocks, by TMA     warp 9
    multiply   the three products                                          warp 8
    weigh      q, or dout, to tensor memory; Z of half of the keys; dq     warps 0-3, 4-7

While Z is made, the tensor cores do the next S; then dq and the next R, while the next P is made.
Barriers stand between: ``x_ready`` says that x may be read, ``x_free`` that it may be overwritten.
R is asked for after what reads Z, and the tensor cores keep that order. Blocks are masked and
follow one another as in `forward_sm100`; it has never run on a GPU either, and is checked so.
`varlen_attention.statistics_kernel` makes exponent and delta.

Shapes: T packed tokens, N query heads, K key heads, G = N / K, H head size, U = T rounded up to M,
M queries of a tile and J keys of a block.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    float2,
    mbarrier,
    tma,
)

from hermes_kernels.forward_sm100 import LOG2E, _barriers, _fetch
from hermes_kernels.halves_sm100 import (
    OTHER_REGISTERS,
    STRIP,
    WEIGH_REGISTERS,
    add_differences,
    half,
    masked,
    score,
    strips_of,
)
from hermes_kernels.softmax_sm100 import pairs, row_a_thread
from hermes_kernels.walk import SHIFTS, back, part


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, dout_desc, own, kv, own_ready, ready, free, row, head, first, after,
    rest, count, blocks, G: gl.constexpr,
):  # fmt: skip
    """q and dout, then each block of keys and of values, in turn."""
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    mbarrier.expect(own_ready.index(0), q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [row, head * H], own_ready.index(0), own.index(0))
    mbarrier.expect(own_ready.index(1), dout_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(dout_desc, [row, head * H], own_ready.index(1), own.index(1))
    for i in range(count):
        n, _ = part(i, first, after, rest, blocks, J)
        at = [n, head // G * H]
        _fetch(k_desc, at, kv, ready, free, 2 * i)
        _fetch(v_desc, at, kv, ready, free, 2 * i + 1)


@gluon.jit
def _multiply(
    q, dout, kv, s, r, dq, ready, free, own_moved, scored, s_free, z_ready, dq_ready, count,
):  # fmt: skip
    """Every product: the next S once the last is in registers, the next R behind dq."""
    STAGES: gl.constexpr = kv.shape[0]
    mbarrier.wait(own_moved.index(0), 0)
    score(q, kv, s, ready, 0, [scored.index(0)])
    mbarrier.wait(own_moved.index(1), 0)
    score(dout, kv, r, ready, 1, [scored.index(1), free.index(1)])
    for i in range(count - 1):
        j = 2 * i
        for x in gl.static_range(2):
            mbarrier.wait(s_free.index(x), i & 1)
        score(q, kv, s, ready, j + 2, [scored.index(0)])
        add_differences(r, kv, dq, z_ready, i, free.index(j % STAGES))
        told = [scored.index(1), free.index((j + 3) % STAGES)]
        score(dout, kv, r, ready, j + 3, told)
    add_differences(r, kv, dq, z_ready, count - 1, dq_ready.index(0))


@gluon.jit
def _weigh(
    x: gl.constexpr, own, mine, s, r, dq, dq_desc, own_ready, own_moved, scored, s_free, z_ready,
    dq_ready, out_ready, exponents_ptr, deltas_ptr, starts, blocks, scale, row, head, first, after,
    rest, count, inner, T, U,
):  # fmt: skip
    """``own[x]`` to tensor memory; Z of half x of the keys of each block; half of dq."""
    M: gl.constexpr = s.shape[0]
    J: gl.constexpr = s.shape[1]
    H: gl.constexpr = dq.shape[1]
    dtype: gl.constexpr = own.dtype
    mbarrier.wait(own_ready.index(x), 0)
    mine.store(own.index(x).load(row_a_thread(M, H)))
    mbarrier.arrive(own_moved.index(x))

    t = row + gl.arange(0, M, gl.SliceLayout(1, row_a_thread(M, STRIP)))  # [M]
    start = gl.load(starts + gl.minimum(t, T - 1))
    statistics = head.to(gl.int64) * SHIFTS * U + t
    exponent = gl.load(exponents_ptr + statistics)
    delta = gl.load(deltas_ptr + statistics)
    for i in range(inner):
        exponents = _exponents(x, i, s, scored, s_free, exponent, scale)
        _differ(x, i, exponents, r, scored, z_ready, delta, dtype)
    for i in range(inner, count):
        begin, end = part(i, first, after, rest, blocks, J)
        exponents = _exponents(x, i, s, scored, s_free, exponent, scale)
        n = begin + x * (J // 2)
        seen = masked(exponents, start - n, gl.minimum(t, end - 1) - n)
        _differ(x, i, seen, r, scored, z_ready, delta, dtype)

    mbarrier.wait(dq_ready.index(0), 0)
    for c in gl.static_range(x, H // 64, 2):
        out = dq.slice(c * 64, 64).load(row_a_thread(M, 64)) * scale
        own.index(0).slice(c * 64, 64, 1).store(out.to(dtype))
    fence_async_shared()
    if x == 1:
        mbarrier.arrive(out_ready.index(0))
    else:
        mbarrier.wait(out_ready.index(0), 0)
        tma.async_copy_shared_to_global(dq_desc, [row, head * H], own.index(0))
        tma.store_wait(0)


@gluon.jit
def _exponents(x: gl.constexpr, i, s, scored, s_free, exponent, scale):
    """scale * S + exponent of half x of the keys, in strips."""
    mbarrier.wait(scored.index(0), i & 1)
    scores = strips_of(s, x)
    mbarrier.arrive(s_free.index(x))
    strips = ()
    for c in gl.static_range(len(scores)):
        factor = float2.full_like(scores[c], scale * LOG2E)
        exponents = float2.fma(scores[c], factor, pairs(exponent, STRIP))
        strips = strips + (float2.unpack(exponents, 1),)  # type: ignore[assignment]
    return strips


@gluon.jit
def _differ(x: gl.constexpr, i, exponents, r, scored, z_ready, delta, dtype: gl.constexpr):
    """Z = P * (R - delta), to tensor memory."""
    weights = ()
    for c in gl.static_range(len(exponents)):
        weights = weights + (float2.pack(gl.exp2(exponents[c]), 1),)  # type: ignore[assignment]
    mbarrier.wait(scored.index(1), i & 1)
    replies = strips_of(r, x)
    for c in gl.static_range(len(weights)):
        z = float2.unpack(weights[c] * (replies[c] - pairs(delta, STRIP)), 1)
        half(r, x, dtype).slice(c * STRIP, STRIP).store(z.to(dtype))
    mbarrier.arrive(z_ready.index(x))


@gluon.jit
def dq_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, exponents_ptr, deltas_ptr, starts, ends, block_of,
    blocks, order, scale, T, U, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of one query tile of one head. Grid (N, U / M)."""
    M: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    dtype: gl.constexpr = q_desc.dtype
    head = gl.program_id(0)
    row = gl.load(order + gl.program_id(1)) * M
    first, after, rest, count, inner = back(row, starts, ends, block_of, blocks, T, M, J)

    own = gl.allocate_shared_memory(dtype, [2, M, H], q_desc.layout)
    kv = gl.allocate_shared_memory(dtype, [STAGES, J, H], k_desc.layout)
    in_s: gl.constexpr = TensorMemoryLayout((M, J), col_stride=1)
    in_q: gl.constexpr = TensorMemoryLayout((M, H), col_stride=1)
    s = allocate_tensor_memory(gl.float32, [M, J], in_s)
    r = allocate_tensor_memory(gl.float32, [M, J], in_s)
    dq = allocate_tensor_memory(gl.float32, [M, H], in_q)
    q = allocate_tensor_memory(dtype, [M, H], in_q)
    dout = allocate_tensor_memory(dtype, [M, H], in_q)
    own_ready, ready, free = _barriers(2), _barriers(STAGES), _barriers(STAGES)
    own_moved, scored, s_free = _barriers(2), _barriers(2), _barriers(2)
    z_ready, dq_ready, out_ready = _barriers(2), _barriers(1), _barriers(1)
    gl.warp_specialize(
        [
            (_weigh, (
                0, own, q, s, r, dq, dq_desc, own_ready, own_moved, scored, s_free, z_ready,
                dq_ready, out_ready, exponents_ptr, deltas_ptr, starts, blocks, scale, row, head,
                first, after, rest, count, inner, T, U,
            )),
            (_weigh, (
                1, own, dout, s, r, dq, dq_desc, own_ready, own_moved, scored, s_free, z_ready,
                dq_ready, out_ready, exponents_ptr, deltas_ptr, starts, blocks, scale, row, head,
                first, after, rest, count, inner, T, U,
            )),
            (_multiply, (
                q, dout, kv, s, r, dq, ready, free, own_moved, scored, s_free, z_ready, dq_ready,
                count,
            )),
            (_load, (
                q_desc, k_desc, v_desc, dout_desc, own, kv, own_ready, ready, free, row, head,
                first, after, rest, count, blocks, G,
            )),
        ],
        [4, 1, 1],
        [WEIGH_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip
