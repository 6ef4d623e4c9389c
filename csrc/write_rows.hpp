// The hot loops of rows.cpp, which includes this once for each instruction set.
//
// Vectors are spelled out, and every function is compiled for its instruction set from the start:
// a compiler that splits wide vectors before it inlines, as GCC does, would split these.
// HERMES_TARGET: its attribute; Vector, load: its own. The constants and Ahead: of rows.cpp.

// Asks for the lines of a column's block to come: what is written past the second-level cache comes
// from memory first, and a core waits for that.
template <class Id>
HERMES_TARGET HERMES_INLINE void expect(const Id* block) {
    const auto begin = reinterpret_cast<std::uintptr_t>(block);  // may be past the column's end
    for (std::size_t i = 0; i < kBlock * sizeof(Id); i += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(begin + kExpected * sizeof(Id) + i), 1);
    }
}

// A run of labels that are all kept, or none of them; `seen` gathers the bits of ids that may not
// fit.
template <bool kKept, class Token, class Id>
HERMES_TARGET HERMES_INLINE void write_run(const Token* __restrict tokens, std::int64_t position,
                                           std::int64_t count, Id* __restrict input_ids,
                                           Id* __restrict labels, Id* __restrict positions,
                                           Ahead& ahead, std::uint32_t& seen) {
    using Place = std::make_unsigned_t<Id>;
    constexpr std::int64_t lanes = sizeof(Vector<Id>) / sizeof(Id);
    constexpr bool may_not_fit = sizeof(Token) >= sizeof(Id);
    constexpr auto kIgnored = static_cast<Id>(kIgnoreIndex);
    const Vector<Id> ignored = Vector<Id>{} + kIgnored;
    Vector<Id> bits{};
    Vector<Place> places;
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
        places[lane] = static_cast<Place>(position + lane);
    }
    std::int64_t i = 0;
    while (count - i >= kBlock) {
        const std::int64_t end = i + std::min(kPiece, (count - i) / kBlock * kBlock);
        for (std::int64_t block = i; block < end; block += kBlock) {
            ahead.step();
            expect(input_ids + block);
#pragma GCC unroll 4
            for (std::int64_t j = block; j < block + kBlock; j += lanes) {
                Vector<Id> ids;
                load<Id>(tokens + j, ids);
                std::memcpy(input_ids + j, &ids, sizeof ids);
                if (may_not_fit) {
                    bits |= ids;
                }
            }
        }
        for (std::int64_t block = i; block < end; block += kBlock) {
            expect(labels + block);
#pragma GCC unroll 4
            for (std::int64_t j = block; j < block + kBlock; j += lanes) {
                Vector<Id> next = ignored;
                if (kKept) {
                    load<Id>(tokens + j + 1, next);
                }
                std::memcpy(labels + j, &next, sizeof next);
            }
        }
        for (std::int64_t block = i; block < end; block += kBlock) {
            expect(positions + block);
#pragma GCC unroll 4
            for (std::int64_t j = block; j < block + kBlock; j += lanes) {
                std::memcpy(positions + j, &places, sizeof places);
                places += static_cast<Place>(lanes);
            }
        }
        i = end;
    }
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
        seen |= static_cast<std::uint32_t>(bits[lane]);
    }
    for (; i < count; ++i) {
        input_ids[i] = static_cast<Id>(tokens[i]);
        labels[i] = kKept ? static_cast<Id>(tokens[i + 1]) : kIgnored;
        positions[i] = static_cast<Id>(position + i);
        seen |= may_not_fit ? tokens[i] : 0;
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

// Returns the bits of all token ids that may exceed Id.
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
