#include "rows.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "isa.hpp"

namespace hermes {
namespace {

// ---- hot loops, one body for each instruction set ---------------------------------------------

template <class Token>
HERMES_INLINE void widen_body(const Token* tokens, std::int64_t count, std::int64_t* out) {
    for (std::int64_t i = 0; i < count; ++i) {
        out[i] = tokens[i];
    }
}

HERMES_INLINE void count_up_body(std::int64_t first, std::int64_t count, std::int64_t* out) {
    for (std::int64_t i = 0; i < count; ++i) {
        out[i] = first + i;
    }
}

template <class Token>
void widen_scalar(const Token* tokens, std::int64_t count, std::int64_t* out) {
    widen_body(tokens, count, out);
}
void count_up_scalar(std::int64_t first, std::int64_t count, std::int64_t* out) {
    count_up_body(first, count, out);
}

#if HERMES_X86_DISPATCH
template <class Token>
HERMES_TARGET_AVX2 void widen_avx2(const Token* tokens, std::int64_t count, std::int64_t* out) {
    widen_body(tokens, count, out);
}
HERMES_TARGET_AVX2 void count_up_avx2(std::int64_t first, std::int64_t count, std::int64_t* out) {
    count_up_body(first, count, out);
}
template <class Token>
HERMES_TARGET_AVX512 void widen_avx512(const Token* tokens, std::int64_t count, std::int64_t* out) {
    widen_body(tokens, count, out);
}
HERMES_TARGET_AVX512 void count_up_avx512(std::int64_t first, std::int64_t count,
                                          std::int64_t* out) {
    count_up_body(first, count, out);
}
#endif

template <class Token>
void widen(const Token* tokens, std::int64_t count, std::int64_t* out) {
    switch (active_isa()) {
#if HERMES_X86_DISPATCH
        case Isa::avx512: return widen_avx512(tokens, count, out);
        case Isa::avx2: return widen_avx2(tokens, count, out);
#endif
        default: return widen_scalar(tokens, count, out);
    }
}

void count_up(std::int64_t first, std::int64_t count, std::int64_t* out) {
    switch (active_isa()) {
#if HERMES_X86_DISPATCH
        case Isa::avx512: return count_up_avx512(first, count, out);
        case Isa::avx2: return count_up_avx2(first, count, out);
#endif
        default: return count_up_scalar(first, count, out);
    }
}

// ---- checks -----------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& message) {
    throw std::invalid_argument(message);
}

std::string name(std::int64_t place, const Request& request) {
    return "sample " + std::to_string(request.sample_of[place]) + " of shard " +
           std::to_string(request.shard_of[place]);
}

// The tokens of one sample that enter its row; offsets and spans are inside the shard.
std::int64_t checked_length(const Request& request, std::int64_t place) {
    if (request.shard_of[place] < 0 ||
        request.shard_of[place] >= static_cast<std::int64_t>(request.shards.size())) {
        fail("shard " + std::to_string(request.shard_of[place]) + " is outside [0, " +
             std::to_string(request.shards.size()) + ")");
    }
    const Shard& shard = request.shards[static_cast<std::size_t>(request.shard_of[place])];
    const std::int64_t sample = request.sample_of[place];
    if (sample < 0 || sample >= shard.samples) {
        fail(name(place, request) + " is outside [0, " + std::to_string(shard.samples) + ")");
    }
    const std::int64_t begin = shard.offsets[sample], end = shard.offsets[sample + 1];
    if (begin < 0 || end <= begin || end > shard.token_count) {
        fail(name(place, request) + " has tokens [" + std::to_string(begin) + ", " +
             std::to_string(end) + ") of " + std::to_string(shard.token_count) +
             ": the store is corrupt");
    }
    const std::int64_t first = shard.span_offsets[sample], last = shard.span_offsets[sample + 1];
    if (first < 0 || last < first || last > shard.span_count) {
        fail(name(place, request) + " has spans [" + std::to_string(first) + ", " +
             std::to_string(last) + ") of " + std::to_string(shard.span_count) +
             ": the store is corrupt");
    }
    std::int64_t at_least = 0;
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t from = shard.spans[2 * i], to = shard.spans[2 * i + 1];
        if (from < at_least || to <= from || to > end - begin) {
            fail(name(place, request) + " has the kept span [" + std::to_string(from) + ", " +
                 std::to_string(to) + ") in " + std::to_string(end - begin) +
                 " tokens: the store is corrupt");
        }
        at_least = to;
    }
    if (end - begin > request.row_length && !request.truncate) {
        fail(name(place, request) + " has " + std::to_string(end - begin) +
             " tokens, more than a row of " + std::to_string(request.row_length) +
             ": the plan was made for other samples");
    }
    return std::min(end - begin, request.row_length);
}

// Calls f(first label, count) for each kept span: label t - 1 asks for token t, and token 0 of a
// segment is asked for by nobody.
template <class F>
void for_each_kept(const Segment& segment, F f) {
    const Shard& shard = *segment.shard;
    for (std::int64_t i = shard.span_offsets[segment.sample];
         i < shard.span_offsets[segment.sample + 1]; ++i) {
        const std::int64_t from = std::max<std::int64_t>(shard.spans[2 * i], 1);
        const std::int64_t to = std::min<std::int64_t>(shard.spans[2 * i + 1], segment.length);
        if (from < to) {
            f(from - 1, to - from);
        }
    }
}

template <class Token>
std::int64_t* fill_segment(const Segment& segment, const Batch& batch, std::int64_t* kept) {
    const Token* tokens =
        static_cast<const Token*>(segment.shard->tokens) + segment.shard->offsets[segment.sample];
    widen(tokens, segment.length, batch.input_ids + segment.start);
    std::int64_t* labels = batch.labels + segment.start;
    std::int64_t done = 0;  // labels up to here are written
    for_each_kept(segment, [&](std::int64_t first, std::int64_t count) {
        std::fill(labels + done, labels + first, kIgnoreIndex);
        widen(tokens + first + 1, count, labels + first);
        count_up(segment.start + first, count, kept);
        kept += count;
        done = first + count;
    });
    std::fill(labels + done, labels + segment.length, kIgnoreIndex);
    return kept;
}

}  // namespace

Layout lay_out_rows(const Request& request) {
    Layout layout;
    layout.segments.reserve(static_cast<std::size_t>(request.places + request.rows));
    for (std::int64_t row = 0; row < request.rows; ++row) {
        std::int64_t used = 0;
        for (std::int64_t i = request.row_starts[row]; i < request.row_starts[row + 1]; ++i) {
            const std::int64_t length = checked_length(request, i);
            const Shard* shard = &request.shards[static_cast<std::size_t>(request.shard_of[i])];
            if (length > request.row_length - used) {
                fail(name(i, request) + " ends at token " + std::to_string(used + length) +
                     " of a row of " + std::to_string(request.row_length) +
                     ": the plan was made for other samples");
            }
            layout.segments.push_back(
                {shard, request.sample_of[i], row * request.row_length + used, length});
            for_each_kept(layout.segments.back(),
                          [&](std::int64_t, std::int64_t count) { layout.kept += count; });
            used += length;
        }
        if (used < request.row_length) {
            layout.segments.push_back(
                {nullptr, 0, row * request.row_length + used, request.row_length - used});
        }
    }
    return layout;
}

void fill_rows(const Request& request, const Layout& layout, const Batch& batch) {
    std::int64_t* kept = batch.kept;
    std::int32_t* cu_seqlens = batch.cu_seqlens;
    *cu_seqlens++ = 0;
    for (const Segment& segment : layout.segments) {
        *cu_seqlens++ = static_cast<std::int32_t>(segment.start + segment.length);
        count_up(0, segment.length, batch.positions + segment.start);
        if (segment.shard == nullptr) {
            std::fill_n(batch.input_ids + segment.start, segment.length, request.pad_id);
            std::fill_n(batch.labels + segment.start, segment.length, kIgnoreIndex);
        } else if (segment.shard->token_bytes == 2) {
            kept = fill_segment<std::uint16_t>(segment, batch, kept);
        } else {
            kept = fill_segment<std::uint32_t>(segment, batch, kept);
        }
    }
}

}  // namespace hermes
