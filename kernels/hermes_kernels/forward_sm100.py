"""wip"""

from __future__ import annotations

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

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
MASKED = gl.constexpr(float("-inf"))
LEAST = gl.constexpr(-1e30)
CHUNK = gl.constexpr(32)
SLACK = gl.constexpr(8.0)
KEEP = gl.constexpr("""{
    .reg .pred seen;
    .reg .b32 bit;
    and.b32 bit, $2, $3;
    setp.ne.b32 seen, bit, 0;
    selp.b32 $0, $1, 0xFF800000, seen;
}""")
STRIPS = gl.constexpr(5)
ROUND = gl.constexpr(12582912.0)
C1 = gl.constexpr(0.6931241750717163)
C2 = gl.constexpr(0.24024099111557007)
C3 = gl.constexpr(0.05590646341443062)
C4 = gl.constexpr(0.009582862257957458)


@gluon.constexpr_function
def row_a_thread(rows, columns):
    """How a group of four warps holds so many columns of tensor memory: one row a thread."""
    return get_tmem_reg_layout(
        gl.float32, (rows, columns), TensorMemoryLayout((rows, columns), col_stride=1), 4
    )


@gluon.constexpr_function
def left(strip):
    return (0, 32, 64, 96, 112)[strip]


@gluon.constexpr_function
def width(strip):
    return (32, 32, 32, 16, 16)[strip]


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q, kv, q_ready, kv_ready, kv_free, row, head, first, blocks,
    G: gl.constexpr,
):  # fmt: skip
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    for x in gl.static_range(2):
        bar = q_ready.index(x)
        mbarrier.expect(bar, q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [row, (head + x) * H], bar, q.index(x))
    for i in range(blocks):
        at = _key(i, row, first, J)
        _fetch(k_desc, kv, kv_ready, kv_free, 2 * i, at, head // G * H)
        _fetch(v_desc, kv, kv_ready, kv_free, 2 * i + 1, at, head // G * H)


@gluon.jit
def _fetch(desc, kv, kv_ready, kv_free, i, row, column):
    STAGES: gl.constexpr = kv.shape[0]
    slot, phase = i % STAGES, i // STAGES & 1
    mbarrier.wait(kv_free.index(slot), phase ^ 1)
    bar = kv_ready.index(slot)
    mbarrier.expect(bar, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], bar, kv.index(slot))


@gluon.jit
def _weights(s, dtype: gl.constexpr):
    M: gl.constexpr = s.shape[0]
    J: gl.constexpr = s.shape[1]
    layout: gl.constexpr = TensorMemoryLayout((M, J), col_stride=1)
    return s._reinterpret(dtype, [M, 2 * J], layout).slice(0, J)


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
        v_slot, k_slot = j % STAGES, (j + 1) % STAGES
        v, k = kv.index(v_slot), kv.index(k_slot).permute((1, 0))
        mbarrier.wait(kv_ready.index(v_slot), j // STAGES & 1)
        _add(v, s[0], o[0], p_ready.index(0), o_scaled.index(0), i, [o_ready.index(0)])
        mbarrier.wait(kv_ready.index(k_slot), (j + 1) // STAGES & 1)
        tcgen05_mma(q.index(0), k, s[0], use_acc=False, mbarriers=[s_ready.index(0)])
        _add(
            v, s[1], o[1], p_ready.index(1), o_scaled.index(1), i,
            [o_ready.index(1), kv_free.index(v_slot)],
        )
        tcgen05_mma(
            q.index(1), k, s[1], use_acc=False, mbarriers=[s_ready.index(1), kv_free.index(k_slot)]
        )
    i = blocks - 1
    j = 2 * i + 1
    mbarrier.wait(kv_ready.index(j % STAGES), j // STAGES & 1)
    for x in gl.static_range(2):
        _add(
            kv.index(j % STAGES), s[x], o[x], p_ready.index(x), o_scaled.index(x), i,
            [o_ready.index(x)],
        )


@gluon.jit
def _add(v, s, o, p_ready, o_scaled, i, done):
    mbarrier.wait(p_ready, i & 1)
    mbarrier.wait(o_scaled, i & 1)
    tcgen05_mma(_weights(s, v.dtype), v, o, use_acc=i > 0, mbarriers=done)


@gluon.jit
def _pairs(x, COLUMNS: gl.constexpr):
    layout: gl.constexpr = row_a_thread(x.shape[0], COLUMNS)
    x = gl.convert_layout(x, gl.SliceLayout(1, layout))
    return float2.pack(x[:, None].broadcast_to(x.shape[0], COLUMNS), 1)


@gluon.jit
def _seen(low, high):
    """[M] int32: of 32 columns, a bit for each from ``low`` to ``high``."""
    bits = ((2 << gl.minimum(high, 31)) - 1) & (-1 << gl.maximum(low, 0))
    return gl.where((high >= 0) & (low <= 31), bits, 0)


@gluon.jit
def _softmax(
    s, alpha, s_ready, p_ready, a_ready, a_free, lse_ptr, starts, scale, row, first, T,
    dtype: gl.constexpr,
):
    M: gl.constexpr = s.shape[0]
    J: gl.constexpr = s.shape[1]
    rows: gl.constexpr = gl.SliceLayout(1, row_a_thread(M, 32))
    t = row + gl.arange(0, M, rows)
    start = gl.load(starts + gl.minimum(t, T - 1))
    last_start = gl.load(starts + gl.minimum(row + M, T) - 1)
    borders = 1 + gl.minimum(gl.cdiv(last_start - first, J), (row - first) // J)
    blocks = 1 + (row - first) // J
    top = gl.full([M], LEAST, gl.float32, rows)
    total = gl.full([M], 0.0, gl.float32, rows)
    for i in range(borders):
        mbarrier.wait(s_ready, i & 1)
        n = _key(i, row, first, J)
        strips = _masked(_scores(s), start - n, t - n)
        top, total = _weigh(
            strips, s, alpha, p_ready, a_ready, a_free, top, total, i, scale, dtype
        )
    for i in range(borders, blocks):
        mbarrier.wait(s_ready, i & 1)
        top, total = _weigh(
            _scores(s), s, alpha, p_ready, a_ready, a_free, top, total, i, scale, dtype
        )
    mbarrier.wait(a_free, (blocks & 1) ^ 1)
    alpha.store(1 / total)
    mbarrier.arrive(a_ready)
    gl.store(lse_ptr + t, (top + gl.log2(total)) * LN2)


@gluon.jit
def _key(i, row, first, J: gl.constexpr):
    return gl.where(i == 0, row, first + (i - 1) * J)


@gluon.jit
def _weigh(
    strips, s, alpha, p_ready, a_ready, a_free, top, total, i, scale, dtype: gl.constexpr
):
    rows: gl.constexpr = gl.SliceLayout(1, row_a_thread(s.shape[0], 32))
    new_top = top
    for c in gl.static_range(STRIPS):
        highest = gl.convert_layout(gl.max(strips[c], 1), rows)
        new_top = gl.maximum(new_top, highest * scale)
    new_top = gl.where(new_top - top > SLACK, new_top, top)
    shrink = gl.exp2(top - new_top)
    mbarrier.wait(a_free, (i & 1) ^ 1)
    alpha.store(shrink)
    mbarrier.arrive(a_ready)
    total = total * shrink
    p = _weights(s, dtype)
    for c in gl.static_range(STRIPS):
        x = float2.pack(strips[c], 1)
        x = float2.fma(x, float2.full_like(x, scale), _pairs(-new_top, width(c)))
        weights = _eased(x) if c == STRIPS - 1 else gl.exp2(float2.unpack(x, 1))
        p.slice(left(c), width(c)).store(weights.to(dtype))
        even, odd = float2.unpack2(float2.pack(weights, 1).sum(1))
        total = total + gl.convert_layout(even + odd, rows)
    mbarrier.arrive(p_ready)
    return new_top, total


@gluon.jit
def _scores(s):
    strips = ()
    for c in gl.static_range(STRIPS):
        strips = strips + (s.slice(left(c), width(c)).load(row_a_thread(s.shape[0], width(c))),)
    return strips


@gluon.jit
def _masked(strips, low, high):
    kept = ()
    for c in gl.static_range(STRIPS):
        kept = kept + (_strip_masked(strips[c], low - left(c), high - left(c), width(c)),)
    return kept


@gluon.jit
def _strip_masked(strip, low, high, WIDTH: gl.constexpr):
    layout: gl.constexpr = row_a_thread(strip.shape[0], WIDTH)
    seen = gl.convert_layout(_seen(low, high), gl.SliceLayout(1, layout))
    bit = 1 << gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    return gl.inline_asm_elementwise(
        KEEP, "=r,r,r,r", [strip, seen[:, None], bit[None, :]],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _eased(x):
    x = float2.pack(gl.maximum(float2.unpack(x, 1), -127.0), 1)
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
    out_desc, q, alpha, o, o_ready, o_scaled, a_ready, a_free, row, head, blocks
):
    M: gl.constexpr = o[0].shape[0]
    H: gl.constexpr = o[0].shape[1]
    layout: gl.constexpr = row_a_thread(M, CHUNK)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    for x in gl.static_range(2):
        mbarrier.wait(a_ready.index(x), 0)
        mbarrier.arrive(a_free.index(x))
        mbarrier.arrive(o_scaled.index(x))
    for i in range(1, blocks):
        for x in gl.static_range(2):
            mbarrier.wait(a_ready.index(x), i & 1)
            shrink = alpha.index(x).load(rows)
            mbarrier.arrive(a_free.index(x))
            mbarrier.wait(o_ready.index(x), (i & 1) ^ 1)
            for c in gl.static_range(H // CHUNK):
                part = o[x].slice(c * CHUNK, CHUNK)
                y = float2.pack(part.load(layout), 1)
                part.store(float2.unpack(y * _pairs(shrink, CHUNK), 1))
            mbarrier.arrive(o_scaled.index(x))
    for x in gl.static_range(2):
        mbarrier.wait(a_ready.index(x), blocks & 1)
        inverse = alpha.index(x).load(rows)
        mbarrier.wait(o_ready.index(x), (blocks & 1) ^ 1)
        for c in gl.static_range(H // CHUNK):
            y = o[x].slice(c * CHUNK, CHUNK).load(layout) * inverse[:, None]
            q.index(x).slice(c * CHUNK, CHUNK, 1).store(y.to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [row, (head + x) * H], q.index(x))
    tma.store_wait(0)


@gluon.jit
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, starts, order, scale, T, U,
    G: gl.constexpr, STAGES: gl.constexpr,
):
    M: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    dtype: gl.constexpr = q_desc.dtype
    head = gl.program_id(0) * 2
    row = gl.load(order + gl.program_id(1)) * M
    first = gl.load(starts + row) // J * J
    blocks = (row + M - first) // J

    q = gl.allocate_shared_memory(dtype, [2, M, H], q_desc.layout)
    kv = gl.allocate_shared_memory(dtype, [STAGES, J, H], k_desc.layout)
    alpha = gl.allocate_shared_memory(
        gl.float32, [2, M], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    scores: gl.constexpr = TensorMemoryLayout((M, J), col_stride=1)
    outputs: gl.constexpr = TensorMemoryLayout((M, H), col_stride=1)
    s = (
        allocate_tensor_memory(gl.float32, [M, J], scores),
        allocate_tensor_memory(gl.float32, [M, J], scores),
    )
    o = (
        allocate_tensor_memory(gl.float32, [M, H], outputs),
        allocate_tensor_memory(gl.float32, [M, H], outputs),
    )
    q_ready, kv_ready, kv_free = _barriers(2), _barriers(STAGES), _barriers(STAGES)
    s_ready, p_ready, o_ready = _barriers(2), _barriers(2), _barriers(2)
    o_scaled, a_ready, a_free = _barriers(2), _barriers(2), _barriers(2)
    lse_ptr += head.to(gl.int64) * U
    scale *= LOG2E
    gl.warp_specialize(
        [
            (_correct, (out_desc, q, alpha, o, o_ready, o_scaled, a_ready, a_free, row, head, blocks)),
            (_softmax, (s[0], alpha.index(0), s_ready.index(0), p_ready.index(0), a_ready.index(0), a_free.index(0), lse_ptr, starts, scale, row, first, T, dtype)),
            (_softmax, (s[1], alpha.index(1), s_ready.index(1), p_ready.index(1), a_ready.index(1), a_free.index(1), lse_ptr + U, starts, scale, row, first, T, dtype)),
            (_multiply, (q, kv, s, o, q_ready, kv_ready, kv_free, s_ready, p_ready, o_ready, o_scaled, blocks)),
            (_load, (q_desc, k_desc, v_desc, q, kv, q_ready, kv_ready, kv_free, row, head, first, blocks, G)),
        ],
        [4, 4, 1, 1],
        [192, 192, 24, 24],
    )


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars
