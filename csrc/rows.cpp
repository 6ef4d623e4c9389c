#include "rows.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "isa.hpp"
#include "threads.hpp"

#if HERMES_X86_DISPATCH
#include <immintrin.h>
#endif

namespace hermes {
namespace {

[[noreturn]] void fail(const std::string& message) {
    throw std::invalid_argument(message);
}

std::string name(const Place& place) {
    return "sample " + std::to_string(place.sample) + " of shard " + std::to_string(place.shard);
}

// ---- hot loops, one body for each instruction set ---------------------------------------------

// Samples lie anywhere in memory, so the processor cannot guess where the next one starts. This
// walks over the tokens to come, one step for each block that is written, and asks for them.
class Ahead {
public:
    Ahead(const Segment* segments, const Segment* end) : next_(segments), end_(end) {}
    HERMES_INLINE void reach(std::int64_t token) {
        while (token_ < token && (left_ > 0 || next_ != end_)) {
            step();
        }
    }
    HERMES_INLINE void step() {
        if (left_ <= 0) {
            if (next_ == end_) {
                return;
            }
            at_ = static_cast<const char*>(next_->tokens);
            stride_ = kBlock * next_->token_bytes;
            token_ = next_->start;
            left_ = next_->length;
            ++next_;
        }
        if (stride_ != 0) {
            __builtin_prefetch(at_);
        }
        at_ += stride_;
        token_ += kBlock;
        left_ -= kBlock;
    }
    static constexpr std::int64_t kBlock = 16;  // tokens; a cache line of uint32

private:
    const Segment* next_;
    const Segment* end_;
    const char* at_ = nullptr;
    std::int64_t stride_ = 0, token_ = 0, left_ = 0;
};

// Measured: neither wider vectors nor stores past the caches are faster.
constexpr std::int64_t kBlock = Ahead::kBlock;
constexpr std::int64_t kPiece = 4 * kBlock;  // of a column, written at once; slower by lines
constexpr std::int64_t kAhead = 1024;        // tokens; as fast as 4096, on Zen 5 slower at 256
constexpr std::int64_t kExpected = 128;      // tokens; as fast as 64, slower at 32 and 512
constexpr std::int64_t kTokensOfOneThread = 1 << 17;  // 50 us, which outweigh starting a thread

namespace scalar {
#define HERMES_TARGET
template <class T>
using Vector __attribute__((vector_size(4 * sizeof(T)))) = T;

template <class Id, class Token>
HERMES_INLINE void load(const Token* tokens, Vector<Id>& ids) {
    Vector<Token> narrow;
    std::memcpy(&narrow, tokens, sizeof narrow);
    ids = __builtin_convertvector(narrow, Vector<Id>);
}
#include "write_rows.hpp"
#undef HERMES_TARGET
}  // namespace scalar

#if HERMES_X86_DISPATCH
namespace avx2 {
#define HERMES_TARGET HERMES_TARGET_AVX2
template <class T>
using Vector __attribute__((vector_size(32))) = T;

// GCC 12 makes four instructions and more of a conversion where there is one.
template <class Id, class Token>
HERMES_TARGET HERMES_INLINE void load(const Token* tokens, Vector<Id>& ids) {
    const auto* at = reinterpret_cast<const __m128i*>(tokens);
    if constexpr (sizeof(Id) == 8 && sizeof(Token) == 4) {
        ids = (Vector<Id>)_mm256_cvtepu32_epi64(_mm_loadu_si128(at));
    } else if constexpr (sizeof(Id) == 8) {
        ids = (Vector<Id>)_mm256_cvtepu16_epi64(_mm_loadl_epi64(at));
    } else if constexpr (sizeof(Token) == 2) {
        ids = (Vector<Id>)_mm256_cvtepu16_epi32(_mm_loadu_si128(at));
    } else {
        std::memcpy(&ids, tokens, sizeof ids);
    }
}
#include "write_rows.hpp"
#undef HERMES_TARGET
}  // namespace avx2
#endif

template <class Id>
std::uint32_t write(const Segment* segments, const Segment* end, Id pad_id,
                    const Batch<Id>& batch) {
    switch (active_isa()) {
#if HERMES_X86_DISPATCH
        case Isa::avx512:
        case Isa::avx2: return avx2::write(segments, end, pad_id, batch);
#endif
        default: return scalar::write(segments, end, pad_id, batch);
    }
}

// ---- checks -----------------------------------------------------------------------------------

// One sample as a segment, its offsets and spans inside the shard; counts its kept labels.
Segment checked_segment(const Shard& shard, const Place& place, const Request& request,
                        std::int64_t& kept) {
    const std::int64_t begin = shard.offsets[place.sample], end = shard.offsets[place.sample + 1];
    if (begin < 0 || end <= begin || end > shard.token_count) {
        fail(name(place) + " has tokens [" + std::to_string(begin) + ", " + std::to_string(end) +
             ") of " + std::to_string(shard.token_count) + ": the store is corrupt");
    }
    const std::int64_t first = shard.span_offsets[place.sample];
    const std::int64_t last = shard.span_offsets[place.sample + 1];
    if (first < 0 || last < first || last > shard.span_count) {
        fail(name(place) + " has spans [" + std::to_string(first) + ", " + std::to_string(last) +
             ") of " + std::to_string(shard.span_count) + ": the store is corrupt");
    }
    const std::int64_t length = std::min(end - begin, request.row_length);
    std::int64_t at_least = 0;
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t from = shard.spans[2 * i], to = shard.spans[2 * i + 1];
        if (from < at_least || to <= from || to > end - begin) {
            fail(name(place) + " has the kept span [" + std::to_string(from) + ", " +
                 std::to_string(to) + ") in " + std::to_string(end - begin) +
                 " tokens: the store is corrupt");
        }
        at_least = to;
        kept += std::max<std::int64_t>(std::min(to, length) - std::max<std::int64_t>(from, 1), 0);
    }
    if (end - begin > request.row_length && !request.truncate) {
        fail(name(place) + " has " + std::to_string(end - begin) + " tokens, more than a row of " +
             std::to_string(request.row_length) + ": the plan was made for other samples");
    }
    const auto* tokens = static_cast<const std::uint8_t*>(shard.tokens);
    return {tokens + begin * shard.token_bytes,
            shard.spans + 2 * first,
            last - first,
            0,
            length,
            shard.token_bytes,
            place};
}

[[noreturn]] void refuse_large_id(const Layout& layout) {
    constexpr std::uint32_t largest = std::numeric_limits<std::int32_t>::max();
    for (const Segment& segment : layout.segments) {
        const auto* tokens = static_cast<const std::uint32_t*>(segment.tokens);
        for (std::int64_t i = 0; segment.token_bytes == 4 && i < segment.length; ++i) {
            if (tokens[i] > largest) {
                fail(name(segment.place) + " has the token id " + std::to_string(tokens[i]) +
                     ", over the " + std::to_string(largest) + " of int32: use int64");
            }
        }
    }
    fail("the token ids changed while they were read");
}

// Where a sample's offsets and spans lie is as random as its tokens.
void prefetch_places(const ShardTable& table, const std::vector<Place>& places, std::size_t i) {
    constexpr std::size_t ahead = 8;
    if (i + 2 * ahead < places.size()) {
        const Place& place = places[i + 2 * ahead];
        const Shard& shard = *table.find(place.shard);
        __builtin_prefetch(shard.offsets + place.sample);
        __builtin_prefetch(shard.span_offsets + place.sample);
    }
    if (i + ahead < places.size()) {
        const Place& place = places[i + ahead];
        const Shard& shard = *table.find(place.shard);
        const std::int64_t first = shard.span_offsets[place.sample];
        if (first >= 0 && first < shard.span_count) {
            __builtin_prefetch(shard.spans + 2 * first);
        }
    }
}

}  // namespace

Layout lay_out_rows(const ShardTable& table, const Places& places, const Request& request) {
    Layout layout;
    layout.segments.reserve(places.places.size() + places.row_ends.size());
    std::size_t i = 0;
    std::int64_t row_start = 0;
    for (const std::int64_t row_end : places.row_ends) {
        std::int64_t used = 0;
        for (; i < static_cast<std::size_t>(row_end); ++i) {
            prefetch_places(table, places.places, i);
            const Place& place = places.places[i];
            Segment segment =
                checked_segment(*table.find(place.shard), place, request, layout.kept);
            if (segment.length > request.row_length - used) {
                fail(name(place) + " ends at token " + std::to_string(used + segment.length) +
                     " of a row of " + std::to_string(request.row_length) +
                     ": the plan was made for other samples");
            }
            segment.start = row_start + used;
            used += segment.length;
            layout.segments.push_back(segment);
        }
        if (used < request.row_length) {
            layout.segments.push_back(
                {nullptr, nullptr, 0, row_start + used, request.row_length - used, 0, {}});
        }
        row_start += request.row_length;
    }
    return layout;
}

template <class Id>
void fill_rows(const Layout& layout, Id pad_id, const Batch<Id>& batch, std::int64_t threads) {
    const Segment* const begin = layout.segments.data();
    const Segment* const end = begin + layout.segments.size();
    const std::int64_t tokens = begin == end ? 0 : end[-1].start + end[-1].length;
    threads = std::clamp<std::int64_t>(tokens / kTokensOfOneThread, 1, threads);
    // Each part is the segments that start in its share of the tokens.
    const auto part_start = [&](std::int64_t part) {
        const std::int64_t token = tokens * part / threads;
        return std::lower_bound(begin, end, token, [](const Segment& segment, std::int64_t at) {
            return segment.start < at;
        });
    };
    std::atomic<std::uint32_t> seen{0};
    const auto write_part = [&](std::int64_t part) {
        const Segment* part_end = part + 1 == threads ? end : part_start(part + 1);
        seen |= write(part_start(part), part_end, pad_id, batch);
    };
    in_threads(threads, write_part);
    if (seen > static_cast<std::uint64_t>(std::numeric_limits<Id>::max())) {
        refuse_large_id(layout);
    }
}

template void fill_rows(const Layout&, std::int32_t, const Batch<std::int32_t>&, std::int64_t);
template void fill_rows(const Layout&, std::int64_t, const Batch<std::int64_t>&, std::int64_t);

void fill_cu_seqlens(const Layout& layout, std::int32_t* cu_seqlens) {
    *cu_seqlens++ = 0;
    for (const Segment& segment : layout.segments) {
        *cu_seqlens++ = static_cast<std::int32_t>(segment.start + segment.length);
    }
}

}  // namespace hermes
