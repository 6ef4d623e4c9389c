"""dk and dv of `varlen_attention` for Blackwell (sm_100), in Gluon: each warp has one role.

A program has a tile of J keys and walks over the blocks of M queries that see it, of one query head
after another. A turn is one block; with everything turned round, keys down and queries across:

    S = k @ q'      P = exp2(scale * S + exponent)     dv += P @ dout
    R = v @ dout'   Z = P * (R - delta)                dk += Z @ q

S, R, dk and dv fill tensor memory; P lies in the columns of S and Z in those of R, from where the
tensor cores take them:

    load       k and v, then a ring of q, dout, exponents and deltas, by TMA     warp 9
    multiply   the four products                                                 warp 8
    weigh      P and Z of half of the queries; at the end dk, or dv              warps 0-3, 4-7

The tensor cores do dv and the next S while Z is made, then dk and the next R while the next P is.
Barriers stand between: ``x_ready`` says that x may be read, ``x_free`` that it may be overwritten.
What writes S or R next is asked for after what reads P or Z, and the tensor cores keep that order.

Heads rise, and in each its blocks, counted from each segment's start (`walk.part`). Only those at a
border are masked: the first, on the diagonal, and the last, of queries that not all keys of the
tile are seen by. A masked weight is exactly 0 and each output has one writer: neither its
neighbours nor its place change any bit of a segment.

This kernel has never run on a GPU; it is checked as `forward_sm100` is.

Shapes: T packed tokens, N query heads, K key heads, S shares of their N / K query heads, H head
size, U = T rounded up to M, M queries and J keys of a block.
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
    tcgen05_mma,
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
from hermes_kernels.softmax_sm100 import row_a_thread
from hermes_kernels.walk import on, part, statistics_of


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, dout_desc, exponents_desc, deltas_desc, kv, ring, vectors, kv_ready,
    ready, free, vectors_ready, row, share, heads, first, after, rest, count, blocks, U,
    S: gl.constexpr,
):  # fmt: skip
    """k and v, then q, dout, exponents and deltas of each turn."""
    M: gl.constexpr = q_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    TURNS: gl.constexpr = vectors_ready.shape[0]
    mbarrier.expect(kv_ready.index(0), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row, share // S * H], kv_ready.index(0), kv.index(0))
    mbarrier.expect(kv_ready.index(1), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [row, share // S * H], kv_ready.index(1), kv.index(1))
    for h in range(heads):
        head = share * heads + h
        for j in range(count):
            i = h * count + j
            n, _ = part(j, first, after, rest, blocks, M)
            at, place = [n, head * H], [statistics_of(n, head, U)]
            _fetch(q_desc, at, ring, ready, free, 2 * i)
            _fetch(dout_desc, at, ring, ready, free, 2 * i + 1)
            # The ring is odd, so dout's place was a q's: of the turn, now over, whose vectors lie
            # here.
            told, slot = vectors_ready.index(i % TURNS), 2 * (i % TURNS)
            mbarrier.expect(told, exponents_desc.block_type.nbytes + deltas_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(exponents_desc, place, told, vectors.index(slot))
            tma.async_copy_global_to_shared(deltas_desc, place, told, vectors.index(slot + 1))


@gluon.jit
def _multiply(
    kv, ring, s, r, dk, dv, kv_ready, ready, free, scored, p_ready, z_ready, done, turns,
):  # fmt: skip
    """Every product: the next S is asked for behind dv, the next R behind dk."""
    STAGES: gl.constexpr = ring.shape[0]
    mbarrier.wait(kv_ready.index(0), 0)
    score(kv.index(0), ring, s, ready, 0, [scored.index(0)])
    mbarrier.wait(kv_ready.index(1), 0)
    score(kv.index(1), ring, r, ready, 1, [scored.index(1)])
    for i in range(turns - 1):
        j = 2 * i
        _add_to_dv(s, ring, dv, p_ready, i, free.index((j + 1) % STAGES))
        score(kv.index(0), ring, s, ready, j + 2, [scored.index(0)])
        add_differences(r, ring, dk, z_ready, i, free.index(j % STAGES))
        score(kv.index(1), ring, r, ready, j + 3, [scored.index(1)])
    _add_to_dv(s, ring, dv, p_ready, turns - 1, done.index(1))
    add_differences(r, ring, dk, z_ready, turns - 1, done.index(0))


@gluon.jit
def _add_to_dv(s, ring, dv, p_ready, i, told):
    """dv += P @ dout of the i-th turn, by strips of both halves of the queries."""
    HALF: gl.constexpr = s.shape[1] // 2
    STRIPS: gl.constexpr = HALF // STRIP
    dout = ring.index((2 * i + 1) % ring.shape[0])
    for c in gl.static_range(STRIPS):
        for x in gl.static_range(2):
            mbarrier.wait(p_ready.index(STRIPS * x + c), i & 1)
            p = half(s, x, ring.dtype).slice(c * STRIP, STRIP)
            block = dout.slice(x * HALF + c * STRIP, STRIP)
            if c + x < STRIPS:
                tcgen05_mma(p, block, dv, use_acc=(i > 0) | (c + x > 0))
            else:
                tcgen05_mma(p, block, dv, use_acc=True, mbarriers=[told])


@gluon.jit
def _weigh(
    x: gl.constexpr, vectors, s, r, sums, kv, out_desc, vectors_ready, scored, p_ready, z_ready,
    done, ends, blocks, scale, factor, row, share, heads, first, after, rest, count, before,
    inner, T,
):  # fmt: skip
    """P and Z of half x of the queries; then factor * sums, which leave by way of kv."""
    J: gl.constexpr = s.shape[0]
    M: gl.constexpr = s.shape[1]
    H: gl.constexpr = sums.shape[1]
    dtype: gl.constexpr = kv.dtype
    j = row + gl.arange(0, J, gl.SliceLayout(1, row_a_thread(J, STRIP)))  # [J]
    end = gl.load(ends + gl.minimum(j, T - 1))
    turns = heads * count
    # Masked are the last parts of a head, if any before this, and the first of the next, if any.
    for h in range(heads + 1):
        begin = h * count
        whole = gl.minimum(begin + before, turns)
        for i in range(gl.maximum(begin + before + inner - count, 0), whole):
            at, stop = part(
                gl.where(i < begin, i + count, i) - begin, first, after, rest, blocks, M
            )
            exponents = _exponents(x, i, s, vectors, vectors_ready, scored, scale)
            n = at + x * (M // 2)
            seen = masked(exponents, j - n, gl.minimum(end, stop) - 1 - n)
            weights = _weights(x, i, seen, s, p_ready, dtype)
            _differ(x, i, weights, r, vectors, scored, z_ready, dtype)
        for i in range(whole, gl.minimum(whole + inner, turns)):
            exponents = _exponents(x, i, s, vectors, vectors_ready, scored, scale)
            weights = _weights(x, i, exponents, s, p_ready, dtype)
            _differ(x, i, weights, r, vectors, scored, z_ready, dtype)
    mbarrier.wait(done.index(x), 0)
    for c in gl.static_range(H // 64):
        out = sums.slice(c * 64, 64).load(row_a_thread(J, 64)) * factor
        kv.index(x).slice(c * 64, 64, 1).store(out.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, share * H], kv.index(x))
    tma.store_wait(0)


@gluon.jit
def _exponents(x: gl.constexpr, i, s, vectors, vectors_ready, scored, scale):
    """scale * S + exponent of half x of the queries, in strips."""
    TURNS: gl.constexpr = vectors_ready.shape[0]
    mbarrier.wait(vectors_ready.index(i % TURNS), i // TURNS & 1)
    mbarrier.wait(scored.index(0), i & 1)
    scores = strips_of(s, x)
    added = _vector(x, vectors.index(2 * i % vectors.shape[0]), s.shape[0])
    strips = ()
    for c in gl.static_range(len(scores)):
        factor = float2.full_like(scores[c], scale * LOG2E)
        strips = strips + (float2.unpack(float2.fma(scores[c], factor, added[c]), 1),)  # type: ignore[assignment]
    return strips


@gluon.jit
def _vector(x: gl.constexpr, vector, J: gl.constexpr):
    """Half x of a vector in shared memory, each strip of it as [J, STRIP], in pairs."""
    HALF: gl.constexpr = vector.shape[0] // 2
    layout: gl.constexpr = row_a_thread(J, STRIP)
    strips = ()
    for c in gl.static_range(HALF // STRIP):
        strip = vector.slice(x * HALF, HALF).slice(c * STRIP, STRIP)
        row = strip.load(gl.SliceLayout(0, layout))[None, :].broadcast_to(J, STRIP)
        strips = strips + (float2.pack(row, 1),)  # type: ignore[assignment]
    return strips


@gluon.jit
def _weights(x: gl.constexpr, i, exponents, s, p_ready, dtype: gl.constexpr):
    """P, in strips, which go to tensor memory too."""
    strips = ()
    for c in gl.static_range(len(exponents)):
        p = gl.exp2(exponents[c])
        half(s, x, dtype).slice(c * STRIP, STRIP).store(p.to(dtype))
        mbarrier.arrive(p_ready.index(len(exponents) * x + c))
        strips = strips + (p,)  # type: ignore[assignment]
    return strips


@gluon.jit
def _differ(x: gl.constexpr, i, weights, r, vectors, scored, z_ready, dtype: gl.constexpr):
    """Z = P * (R - delta), to tensor memory."""
    mbarrier.wait(scored.index(1), i & 1)
    replies = strips_of(r, x)
    delta = _vector(x, vectors.index(2 * i % vectors.shape[0] + 1), r.shape[0])
    for c in gl.static_range(len(weights)):
        z = float2.pack(weights[c], 1) * (replies[c] - delta[c])
        half(r, x, dtype).slice(c * STRIP, STRIP).store(float2.unpack(z, 1).to(dtype))
    mbarrier.arrive(z_ready.index(x))


@gluon.jit
def dkdv_kernel(
    q_desc, k_desc, v_desc, dout_desc, exponents_desc, deltas_desc, dk_desc, dv_desc, starts, ends,
    block_of, blocks, order, scale, T, U,
    G: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile and key head, over one of S shares of its G query heads.

    Outputs are [T, K * S, H]. Grid (K * S, U / J).
    """
    gl.static_assert(STAGES % 2 == 1, "the ring must be odd: see where vectors are loaded")
    M: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    dtype: gl.constexpr = q_desc.dtype
    share = gl.program_id(0)
    row = gl.load(order + gl.program_id(1)) * J
    first, after, rest, count, before, inner = on(row, starts, ends, block_of, blocks, T, J, M)

    kv = gl.allocate_shared_memory(dtype, [2, J, H], k_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [STAGES, M, H], q_desc.layout)
    vectors = gl.allocate_shared_memory(gl.float32, [STAGES - 1, M], exponents_desc.layout)
    in_s: gl.constexpr = TensorMemoryLayout((J, M), col_stride=1)
    in_dk: gl.constexpr = TensorMemoryLayout((J, H), col_stride=1)
    s = allocate_tensor_memory(gl.float32, [J, M], in_s)
    r = allocate_tensor_memory(gl.float32, [J, M], in_s)
    dk = allocate_tensor_memory(gl.float32, [J, H], in_dk)
    dv = allocate_tensor_memory(gl.float32, [J, H], in_dk)
    kv_ready, ready, free = _barriers(2), _barriers(STAGES), _barriers(STAGES)
    vectors_ready, scored = _barriers(STAGES // 2), _barriers(2)
    p_ready, z_ready, done = _barriers(4), _barriers(2), _barriers(2)
    gl.warp_specialize(
        [
            (_weigh, (
                0, vectors, s, r, dk, kv, dk_desc, vectors_ready, scored, p_ready, z_ready, done,
                ends, blocks, scale, scale, row, share, G // S, first, after, rest, count,
                before, inner, T,
            )),
            (_weigh, (
                1, vectors, s, r, dv, kv, dv_desc, vectors_ready, scored, p_ready, z_ready, done,
                ends, blocks, scale, 1.0, row, share, G // S, first, after, rest, count,
                before, inner, T,
            )),
            (_multiply, (
                kv, ring, s, r, dk, dv, kv_ready, ready, free, scored, p_ready, z_ready, done,
                G // S * count,
            )),
            (_load, (
                q_desc, k_desc, v_desc, dout_desc, exponents_desc, deltas_desc, kv, ring, vectors,
                kv_ready, ready, free, vectors_ready, row, share, G // S, first, after, rest,
                count, blocks, U, S,
            )),
        ],
        [4, 1, 1],
        [WEIGH_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip
