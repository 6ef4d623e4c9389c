// The hot loops of rows.cpp, which includes this once for each instruction set.
//
// Vectors are spelled out, and every function is compiled for its instruction set from the start:
// a compiler that splits wide vectors before it inlines, as GCC does, would split these.
// HERMES_TARGET: its attribute. kLanes, kPiece, kBlock, kAhead, Ahead: of rows.cpp.

template <class T>
using Vector __attribute__((vector_size(kLanes * sizeof(T)))) = T;

// A run of labels that are all kept, or none of them; `seen` gathers the bits of its token ids.
template <bool kKept, class Token, class Id>
HERMES_TARGET HERMES_INLINE void write_run(const Token* __restrict tokens, std::int64_t position,
                                           std::int64_t count, Id* __restrict input_ids,
                                           Id* __restrict labels, Id* __restrict positions,
                                           Ahead& ahead, std::uint32_t& seen) {
    using Narrow = Vector<Token>;
    using Wide = Vector<Id>;
    constexpr auto kIgnored = static_cast<Id>(kIgnoreIndex);
    const Wide ignored = Wide{} + kIgnored;
    Narrow bits{};
    std::int64_t i = 0;
    while (count - i >= kBlock) {
        const std::int64_t end = i + std::min(kPiece, (count - i) / kBlock * kBlock);
        for (std::int64_t block = i; block < end; block += kBlock) {
            ahead.step();
#pragma GCC unroll 4
            for (std::int64_t j = block; j < block + kBlock; j += kLanes) {
                Narrow some;
                std::memcpy(&some, tokens + j, sizeof some);
                const Wide ids = __builtin_convertvector(some, Wide);
                std::memcpy(input_ids + j, &ids, sizeof ids);
                bits |= some;
            }
        }
#pragma GCC unroll 4
        for (std::int64_t j = i; j < end; j += kLanes) {
            Wide next = ignored;
            if (kKept) {
                Narrow some;
                std::memcpy(&some, tokens + j + 1, sizeof some);
                next = __builtin_convertvector(some, Wide);
            }
            std::memcpy(labels + j, &next, sizeof next);
        }
        for (std::int64_t j = i; j < end; ++j) {
            positions[j] = static_cast<Id>(position + j);
        }
        i = end;
    }
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        seen |= bits[lane];
    }
    for (; i < count; ++i) {
        input_ids[i] = static_cast<Id>(tokens[i]);
        labels[i] = kKept ? static_cast<Id>(tokens[i + 1]) : kIgnored;
        positions[i] = static_cast<Id>(position + i);
        seen |= tokens[i];
    }
}

// Label t - 1 asks for token t where it is kept; token 0 of a segment is asked for by nobody.
template <class Token, class Id>
HERMES_TARGET HERMES_INLINE void write_sample(const Segment& segment, const Batch<Id>& batch,
                                              Ahead& ahead, std::uint32_t& seen) {
    const auto* tokens = static_cast<const Token*>(segment.tokens);
    Id* const input_ids = batch.input_ids + segment.start;
    Id* const labels = batch.labels + segment.start;
    Id* const positions = batch.positions + segment.start;
    std::int64_t done = 0;
    for (std::int64_t i = 0; i < segment.span_count; ++i) {
        const std::int64_t first = std::max<std::int64_t>(segment.spans[2 * i], done + 1) - 1;
        const std::int64_t end = std::min<std::int64_t>(segment.spans[2 * i + 1], segment.length);
        if (first + 1 < end) {
            write_run<false>(tokens + done, done, first - done, input_ids + done, labels + done,
                             positions + done, ahead, seen);
            done = end - 1;
            write_run<true>(tokens + first, first, done - first, input_ids + first, labels + first,
                            positions + first, ahead, seen);
        }
    }
    write_run<false>(tokens + done, done, segment.length - done, input_ids + done, labels + done,
                     positions + done, ahead, seen);
}

template <class Id>
HERMES_TARGET HERMES_INLINE void write_padding(const Segment& segment, Id pad_id,
                                               const Batch<Id>& batch) {
    std::fill_n(batch.input_ids + segment.start, segment.length, pad_id);
    std::fill_n(batch.labels + segment.start, segment.length, static_cast<Id>(kIgnoreIndex));
    std::iota(batch.positions + segment.start, batch.positions + segment.start + segment.length,
              Id{0});
}

// Returns the bits of all token ids.
template <class Id>
HERMES_TARGET std::uint32_t write(const Segment* segment, const Segment* end, Id pad_id,
                                  const Batch<Id>& batch) {
    Ahead ahead(segment, end);
    std::uint32_t seen = 0;
    for (; segment != end; ++segment) {
        ahead.reach(segment->start + kAhead);
        switch (segment->token_bytes) {
            case 2: write_sample<std::uint16_t>(*segment, batch, ahead, seen); break;
            case 4: write_sample<std::uint32_t>(*segment, batch, ahead, seen); break;
            default: write_padding(*segment, pad_id, batch);
        }
    }
    return seen;
}
