// Blocks of attention.cpp, which includes this once for each instruction set, and says how.
//
// A lane is a query: one head at one token, the heads that share a key side by side. Scores lie as
// [keys, lanes], so their maxima and sums never step across a vector, gradients of keys and values
// add up over heads by themselves, and only queries are transposed, once for a block.
//
// Shapes: L lanes of a panel, Y keys of a tile, H head size and zeros behind it to `room`.

#include "attention_vectors.hpp"

template <class R>
struct Panel {
    std::int64_t first, lanes;  // of its segment
    std::int64_t vectors;       // that hold a lane
    std::int64_t sure, seen;    // keys that all of its lanes see; that one does
    R* q_HL;
    R* place_L;  // token of the lane less that of the first lane
};

template <class R>
struct Attending : Panel<R> {
    R *out_HL, *largest_L, *sum_L;  // of the weights and keys until now
};

template <class R>
struct Differentiating : Panel<R> {
    R *q_LH, *grad_LH, *grad_HL, *dq_HL;
    R *lse_L, *delta_L;  // delta: gradient times output, summed over H
};

// The lanes of a segment, one after the other, without a division for each.
struct Lane {
    HERMES_INLINE Lane(const Geometry& g, const Block& block, std::int64_t number)
        : token(block.start + number / g.group),
          first_head(block.key_head * g.group),
          end_head(first_head + g.group),
          head(first_head + number % g.group) {}
    HERMES_INLINE void step() {
        if (++head == end_head) {
            head = first_head;
            ++token;
        }
    }
    std::int64_t token, first_head, end_head, head;
};

template <class R>
HERMES_TARGET void lay_out(Panel<R>& panel, const Geometry& g, const Block& block,
                           std::int64_t number, Arena<R>& arena) {
    constexpr std::int64_t width = kWidth<R>;
    panel.first = block.first_lane + number * kPanel;
    panel.lanes = std::min(block.first_lane + block.lanes - panel.first, kPanel);
    panel.vectors = (panel.lanes + width - 1) / width;
    panel.sure = panel.first / g.group + 1;
    panel.seen = (panel.first + panel.lanes - 1) / g.group + 1;
    panel.q_HL = arena.take(g.room * kPanel);
    panel.place_L = arena.take(kPanel);
    Lane lane(g, block, panel.first);
    const std::int64_t token = lane.token;
    for (std::int64_t l = 0; l < kPanel; ++l, lane.step()) {
        panel.place_L[l] = static_cast<R>(lane.token - token);
    }
}

// ---- lines in and out -------------------------------------------------------------------------

template <class Element>
HERMES_TARGET HERMES_INLINE Element* key_of(Element* data_TKH, const Geometry& g,
                                            const Block& block, std::int64_t key) {
    return data_TKH + ((block.start + key) * g.key_heads + block.key_head) * g.size;
}

// Asks for a line of the next key head, which a thread often takes next; it may lie anywhere.
template <class Element>
HERMES_TARGET HERMES_INLINE void prefetch(const Element* line, std::int64_t size) {
    constexpr std::int64_t step = 64 / sizeof(Element);  // a cache line
    for (std::int64_t h = 0; h < size; h += step) {
        __builtin_prefetch(line + h);
    }
}

// A panel's lanes, and zeros to the end of their last vector.
template <class Element>
HERMES_TARGET void take_lanes(const Element* data_TNH, const Geometry& g, const Block& block,
                              const Panel<Real<Element>>& panel, Real<Element>* to_LH) {
    Lane lane(g, block, panel.first);
    for (std::int64_t l = 0; l < panel.lanes; ++l, lane.step()) {
        const Element* const line = data_TNH + (lane.token * g.heads + lane.head) * g.size;
        prefetch(line + g.group * g.size, g.size);
        widen(line, g.size, g.room, to_LH + l * g.room);
    }
    const std::int64_t end = panel.vectors * kWidth<Real<Element>>;
    std::fill(to_LH + panel.lanes * g.room, to_LH + end * g.room, Real<Element>{0});
}

// Keys or values of a segment, and zeros up to a whole tile of a product's rows.
template <class Element>
HERMES_TARGET void take_keys(const Element* data_TKH, const Geometry& g, const Block& block,
                             std::int64_t first, std::int64_t count, Real<Element>* to_YH) {
    for (std::int64_t y = 0; y < count; ++y) {
        const Element* const line = key_of(data_TKH, g, block, first + y);
        prefetch(line + g.size, g.size);
        widen(line, g.size, g.room, to_YH + y * g.room);
    }
    std::fill(to_YH + count * g.room, to_YH + whole_tiles(count) * g.room, Real<Element>{0});
}

template <class R>
HERMES_TARGET void turn_lanes(const R* from_LH, const Geometry& g, const Panel<R>& panel,
                              R* to_HL) {
    transpose(from_LH, g.room, panel.vectors * kWidth<R>, g.room, to_HL, kPanel);
}

// Each lane times its factor; `room_LH` is spoilt.
template <class Element>
HERMES_TARGET void give_lanes(const Real<Element>* from_HL, const Real<Element>* factor_L,
                              const Geometry& g, const Block& block,
                              const Panel<Real<Element>>& panel, Real<Element>* room_LH,
                              Element* to_TNH) {
    transpose(from_HL, kPanel, g.room, panel.vectors * kWidth<Real<Element>>, room_LH, g.room);
    Lane lane(g, block, panel.first);
    for (std::int64_t l = 0; l < panel.lanes; ++l, lane.step()) {
        narrow(room_LH + l * g.room, factor_L[l], g.size,
               to_TNH + (lane.token * g.heads + lane.head) * g.size);
    }
}

// ---- forward ----------------------------------------------------------------------------------

// Scores of keys that come after a lane's token become minus infinity; `keys` of them from `first`.
template <class R>
HERMES_TARGET void hide_later_keys(const Panel<R>& panel, std::int64_t first, std::int64_t keys,
                                   R* scores_YL) {
    constexpr R hidden = -std::numeric_limits<R>::infinity();
    for (std::int64_t y = std::max<std::int64_t>(panel.sure - first, 0); y < keys; ++y) {
        const R place = static_cast<R>(first + y + 1 - panel.sure);
        for (std::int64_t l = 0; l < panel.vectors * kWidth<R>; l += kWidth<R>) {
            R* const at = scores_YL + y * kPanel + l;
            store(at, load(panel.place_L + l) < place ? Vector<R>{} + hidden : load<R>(at));
        }
    }
}

// Scores to weights e^(scale * (score - largest)); what was summed before them is to be multiplied
// by `factors_L`.
template <class R>
HERMES_TARGET void weigh(const Attending<R>& panel, std::int64_t keys, R scale, R* scores_YL,
                         R* factors_L) {
    constexpr R lowest = -std::numeric_limits<R>::infinity();
    for (std::int64_t l = 0; l < panel.vectors * kWidth<R>; l += kWidth<R>) {
        const Vector<R> before = load<R>(panel.largest_L + l);
        Vector<R> largest = before;
        for (std::int64_t y = 0; y < keys; ++y) {
            const Vector<R> score = load<R>(scores_YL + y * kPanel + l);
            largest = score > largest ? score : largest;
        }
        store(panel.largest_L + l, largest);
        const Vector<R> from = largest == lowest ? Vector<R>{} : largest;
        Vector<R> sum{};
        for (std::int64_t y = 0; y < keys; ++y) {
            R* const at = scores_YL + y * kPanel + l;
            const Vector<R> weight = exp_of((load<R>(at) - from) * scale);
            store(at, weight);
            sum += weight;
        }
        const Vector<R> factor = exp_of((before - from) * scale);
        store(factors_L + l, factor);
        store(panel.sum_L + l, load<R>(panel.sum_L + l) * factor + sum);
    }
}

template <class Element>
HERMES_TARGET void finish(const Geometry& g, const AttentionForward<Element>& arrays,
                          const Block& block, const Attending<Real<Element>>& panel,
                          Real<Element>* room_LH) {
    using R = Real<Element>;
    R factor_L[kPanel];
    Lane lane(g, block, panel.first);
    for (std::int64_t l = 0; l < panel.lanes; ++l, lane.step()) {
        factor_L[l] = 1 / panel.sum_L[l];
        arrays.lse[lane.head * g.lse_stride + lane.token] =
            panel.largest_L[l] * static_cast<R>(g.scale) + std::log(panel.sum_L[l]);
    }
    give_lanes(panel.out_HL, factor_L, g, block, panel, room_LH, arrays.out);
}

template <class Element>
HERMES_TARGET void attend_block(const Geometry& g, const AttentionForward<Element>& arrays,
                                const Block& block, Real<Element>* scratch) {
    using R = Real<Element>;
    const R scale = static_cast<R>(g.scale);
    Arena<R> arena{scratch};
    R* const k_YH = arena.take(kKeys * g.room);
    R* const v_YH = arena.take(kKeys * g.room);
    R* const scores_YL = arena.take(kKeys * kPanel);
    R* const factors_L = arena.take(kPanel);
    Attending<R> panels[kMostPanels];
    const std::int64_t count = (block.lanes + kPanel - 1) / kPanel;
    for (std::int64_t p = 0; p < count; ++p) {
        Attending<R>& panel = panels[p];
        lay_out(panel, g, block, p, arena);
        panel.out_HL = arena.take(g.room * kPanel);
        panel.largest_L = arena.take(kPanel);
        panel.sum_L = arena.take(kPanel);
        std::fill_n(panel.largest_L, kPanel, -std::numeric_limits<R>::infinity());
        std::fill_n(panel.sum_L, kPanel, R{0});
        take_lanes(arrays.q, g, block, panel, k_YH);
        turn_lanes(k_YH, g, panel, panel.q_HL);
    }
    const std::int64_t keys = (block.first_lane + block.lanes - 1) / g.group + 1;
    for (std::int64_t first = 0; first < keys; first += kKeys) {
        const std::int64_t tile = std::min(keys - first, kKeys);
        take_keys(arrays.k, g, block, first, tile, k_YH);
        take_keys(arrays.v, g, block, first, tile, v_YH);
        for (std::int64_t p = 0; p < count; ++p) {
            const Attending<R>& panel = panels[p];
            const std::int64_t seen = std::min(panel.seen - first, kKeys);
            if (seen <= 0) {
                continue;
            }
            multiply<Into::fresh, R>({k_YH, g.room, 1}, {panel.q_HL, kPanel}, seen, panel.vectors,
                                     g.size, {scores_YL, kPanel});
            hide_later_keys(panel, first, seen, scores_YL);
            weigh(panel, seen, scale, scores_YL, factors_L);
            const Left<R> values{v_YH, 1, g.room};
            if (first == 0) {
                multiply<Into::fresh, R>(values, {scores_YL, kPanel}, g.room, panel.vectors, seen,
                                         {panel.out_HL, kPanel});
            } else {
                multiply<Into::rescaled_sum, R>(values, {scores_YL, kPanel}, g.room, panel.vectors,
                                                seen, {panel.out_HL, kPanel}, factors_L);
            }
        }
    }
    for (std::int64_t p = 0; p < count; ++p) {
        finish(g, arrays, block, panels[p], k_YH);
    }
}

// ---- backward ---------------------------------------------------------------------------------

// Scores to weights, and gradients of weights to gradients of scores; 0 where a key is hidden, and
// to the end of a tile, whose rows may be keys that another panel sees.
template <class R>
HERMES_TARGET void differentiate_weights(const Differentiating<R>& panel, std::int64_t first,
                                         std::int64_t keys, R scale, R* scores_YL, R* grads_YL) {
    for (std::int64_t l = 0; l < panel.vectors * kWidth<R>; l += kWidth<R>) {
        const Vector<R> lse = load<R>(panel.lse_L + l), delta = load<R>(panel.delta_L + l);
        for (std::int64_t y = 0; y < keys; ++y) {
            R* const score = scores_YL + y * kPanel + l;
            R* const grad = grads_YL + y * kPanel + l;
            const Vector<R> weight = exp_of(load<R>(score) * scale - lse);
            store(score, weight);
            store(grad, weight * (load<R>(grad) - delta));
        }
        const Vector<R> place = load<R>(panel.place_L + l);
        for (std::int64_t y = std::max<std::int64_t>(panel.sure - first, 0); y < keys; ++y) {
            const R later = static_cast<R>(first + y + 1 - panel.sure);
            for (R* const at : {scores_YL + y * kPanel + l, grads_YL + y * kPanel + l}) {
                store(at, place < later ? Vector<R>{} : load<R>(at));
            }
        }
    }
}

template <class Element>
HERMES_TARGET void take_panel(const Geometry& g, const AttentionBackward<Element>& arrays,
                              const Block& block, const Differentiating<Real<Element>>& panel,
                              Real<Element>* room_LH) {
    using R = Real<Element>;
    take_lanes(arrays.q, g, block, panel, panel.q_LH);
    turn_lanes(panel.q_LH, g, panel, panel.q_HL);
    take_lanes(arrays.grad, g, block, panel, panel.grad_LH);
    turn_lanes(panel.grad_LH, g, panel, panel.grad_HL);
    take_lanes(arrays.out, g, block, panel, room_LH);
    std::fill_n(panel.lse_L, kPanel, R{0});
    std::fill_n(panel.delta_L, kPanel, R{0});
    Lane lane(g, block, panel.first);
    for (std::int64_t l = 0; l < panel.lanes; ++l, lane.step()) {
        Vector<R> sum{};
        for (std::int64_t h = l * g.room; h < (l + 1) * g.room; h += kWidth<R>) {
            sum += load<R>(panel.grad_LH + h) * load<R>(room_LH + h);
        }
        panel.delta_L[l] = sum_of<R>(sum);
        panel.lse_L[l] = arrays.lse[lane.head * g.lse_stride + lane.token];
    }
}

// Adds what this block gives to the gradients of its keys; the block that sees them last rounds.
template <class Element>
HERMES_TARGET void give_keys(const Geometry& g, const Block& block, std::int64_t first,
                             std::int64_t count, Real<Element> factor, Real<Element>* from_YH,
                             Real<Element>* sums_TKH, Element* to_TKH) {
    using R = Real<Element>;
    for (std::int64_t y = 0; y < count; ++y) {
        R* const from = from_YH + y * g.room;
        R* const sums = key_of(sums_TKH, g, block, first + y);
        if (!block.is_last) {
            for (std::int64_t h = 0; h < g.size; ++h) {
                from[h] += sums[h];
            }
        }
        if ((first + y) * g.group >= block.first_lane) {
            narrow(from, factor, g.size, key_of(to_TKH, g, block, first + y));
        } else {
            narrow(from, R{1}, g.size, sums);
        }
    }
}

template <class Element>
HERMES_TARGET void differentiate_block(const Geometry& g, const AttentionBackward<Element>& arrays,
                                       const KeySums<Real<Element>>& sums, const Block& block,
                                       Real<Element>* scratch, Turns& turns) {
    using R = Real<Element>;
    const R scale = static_cast<R>(g.scale);
    Arena<R> arena{scratch};
    R* const k_YH = arena.take(kKeys * g.room);
    R* const v_YH = arena.take(kKeys * g.room);
    R* const dk_YH = arena.take(kKeys * g.room);
    R* const dv_YH = arena.take(kKeys * g.room);
    R* const weights_YL = arena.take(kKeys * kPanel);
    R* const grads_YL = arena.take(kKeys * kPanel);
    const std::int64_t vectors = g.room / kWidth<R>;
    Differentiating<R> panels[kMostPanels];
    const std::int64_t count = (block.lanes + kPanel - 1) / kPanel;
    for (std::int64_t p = 0; p < count; ++p) {
        Differentiating<R>& panel = panels[p];
        lay_out(panel, g, block, p, arena);
        for (R** buffer : {&panel.q_LH, &panel.grad_LH, &panel.grad_HL, &panel.dq_HL}) {
            *buffer = arena.take(g.room * kPanel);
        }
        panel.lse_L = arena.take(kPanel);
        panel.delta_L = arena.take(kPanel);
        take_panel(g, arrays, block, panel, k_YH);
    }
    const std::int64_t keys = (block.first_lane + block.lanes - 1) / g.group + 1;
    for (std::int64_t first = 0; first < keys; first += kKeys) {
        const std::int64_t tile = std::min(keys - first, kKeys);
        take_keys(arrays.k, g, block, first, tile, k_YH);
        take_keys(arrays.v, g, block, first, tile, v_YH);
        // The last panel sees all of the tile's keys.
        for (std::int64_t p = count - 1; p >= 0 && panels[p].seen > first; --p) {
            const Differentiating<R>& panel = panels[p];
            const std::int64_t seen = std::min(panel.seen - first, kKeys);
            multiply<Into::fresh, R>({k_YH, g.room, 1}, {panel.q_HL, kPanel}, seen, panel.vectors,
                                     g.size, {weights_YL, kPanel});
            multiply<Into::fresh, R>({v_YH, g.room, 1}, {panel.grad_HL, kPanel}, seen,
                                     panel.vectors, g.size, {grads_YL, kPanel});
            differentiate_weights(panel, first, whole_tiles(seen), scale, weights_YL, grads_YL);
            const auto into_keys =
                p == count - 1 ? &multiply<Into::fresh, R> : &multiply<Into::sum, R>;
            into_keys({weights_YL, kPanel, 1}, {panel.grad_LH, g.room}, seen, vectors, panel.lanes,
                      {dv_YH, g.room}, nullptr);
            into_keys({grads_YL, kPanel, 1}, {panel.q_LH, g.room}, seen, vectors, panel.lanes,
                      {dk_YH, g.room}, nullptr);
            const auto into_dq = first == 0 ? &multiply<Into::fresh, R> : &multiply<Into::sum, R>;
            into_dq({k_YH, 1, g.room}, {grads_YL, kPanel}, g.room, panel.vectors, seen,
                    {panel.dq_HL, kPanel}, nullptr);
        }
        turns.await(block, first / kKeys);
        give_keys(g, block, first, tile, scale, dk_YH, sums.dk, arrays.dk);
        give_keys(g, block, first, tile, R{1}, dv_YH, sums.dv, arrays.dv);
        turns.pass(block, first / kKeys);
    }
    R factor_L[kPanel];
    std::fill_n(factor_L, kPanel, scale);
    for (std::int64_t p = 0; p < count; ++p) {
        give_lanes(panels[p].dq_HL, factor_L, g, block, panels[p], k_YH, arrays.dq);
    }
}
