#include "layout.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "buffer.hpp"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace hermes {
namespace {

// Of a row: where its ids lie among the packed ones, and how many. In one word, so that the rows
// are kept and shuffled where their offsets will stand.
struct Row {
    std::uint32_t begin;
    std::uint32_t size;

    static Row of(std::int64_t word) {
        const auto bits = static_cast<std::uint64_t>(word);
        return {static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(bits >> 32)};
    }
    std::int64_t word() const {
        return static_cast<std::int64_t>(std::uint64_t{size} << 32 | begin);
    }
};

// Where each row's ids begin, by its number in the plan; `words` become the rows.
Buffer<std::uint32_t> measure_rows(const Plan& plan, std::int64_t* words) {
    // First how much larger each row is than the one before it.
    Buffer<std::uint32_t> begins(static_cast<std::size_t>(plan.rows) + 1);
    std::fill(begins.begin(), begins.end(), 0U);
    for (const Placement& p : plan.placements) {
        begins[p.first] += p.each;
        begins[p.first + p.rows] -= p.each;
    }
    Row row{0, 0};
    for (std::int64_t i = 0; i < plan.rows; ++i) {
        row.size += begins[i];
        words[i] = row.word();
        begins[i] = row.begin;
        row.begin += row.size;
    }
    return begins;
}

// Puts `each` ids at the end of each of these rows.
void deal_many(const std::uint32_t* __restrict ids, std::uint32_t each,
               std::uint32_t* __restrict ends, std::size_t rows, std::uint32_t* __restrict packed) {
    for (std::size_t row = 0; row < rows; ++row, ids += each) {
        std::copy_n(ids, each, packed + ends[row]);
        ends[row] += each;
    }
}

// The same for a number that the compiler knows, which spares a call for each row.
template <std::uint32_t each>
void deal_few(const std::uint32_t* __restrict ids, std::uint32_t, std::uint32_t* __restrict ends,
              std::size_t rows, std::uint32_t* __restrict packed) {
    deal_many(ids, each, ends, rows, packed);
}

constexpr std::array<decltype(&deal_many), 9> kDealFew{nullptr,     deal_few<1>, deal_few<2>,
                                                       deal_few<3>, deal_few<4>, deal_few<5>,
                                                       deal_few<6>, deal_few<7>, deal_few<8>};

// Asks for the lines of `count` elements that will be written, as far as a cache holds them.
void expect_writes(const std::uint32_t* begin, std::size_t count) {
    constexpr std::size_t line = 64 / sizeof *begin, most = 512;
    for (std::size_t i = 0; i < std::min(count, most); i += line) {
        __builtin_prefetch(begin + i, 1);
    }
}

// Puts sorted ids where their rows are; what they were sorted by is the order of the placements.
void deal(const Plan& plan, const std::uint32_t* ids, std::uint32_t* ends, std::uint32_t* packed) {
    // The rows of a placement lie together, those of the next anywhere: first their ends are asked
    // for, then where those point. Of few rows that takes longer than it spares.
    constexpr std::uint32_t many = 32;
    constexpr std::size_t soon = 8, later = 16;  // placements ahead
    const std::vector<Placement>& all = plan.placements;
    for (std::size_t i = 0; i < all.size(); ++i) {
        if (i + later < all.size() && all[i + later].rows >= many) {
            expect_writes(ends + all[i + later].first, all[i + later].rows);
        }
        if (i + soon < all.size() && all[i + soon].rows >= many) {
            const auto [first, rows, each] = all[i + soon];
            expect_writes(packed + ends[first], ends[first + rows - 1] + each - ends[first]);
        }
        const auto [first, rows, each] = all[i];
        const auto deal_some = each < kDealFew.size() ? kDealFew[each] : deal_many;
        deal_some(ids, each, ends + first, rows, packed);
        ids += std::size_t{rows} * each;
    }
}

// Copies the `count` ids of the rows one row after another. In place of each row's word stands at
// last where its ids begin.
void gather(const std::uint32_t* packed, std::int64_t count, std::int64_t rows, std::uint32_t* out,
            std::int64_t* words) {
    constexpr std::int64_t few = 8;    // so many are copied at once, needed or not
    constexpr std::int64_t far = 192;  // rows ahead: they lie anywhere in what may fit in no cache
    constexpr std::uint32_t line = 64 / sizeof *out;
    std::int64_t written = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
        if (i + far < rows) {
            const Row row = Row::of(words[i + far]);
            const std::uint32_t* next = packed + row.begin;
            for (std::uint32_t at = 0; at < row.size; at += line) {
                __builtin_prefetch(next + at);
            }
            __builtin_prefetch(next + std::max<std::int64_t>(row.size, few) - 1);
        }
        const auto [begin, size] = Row::of(words[i]);
        if (size <= few && std::max<std::int64_t>(begin, written) + few <= count) {
            std::memcpy(out + written, packed + begin, few * sizeof *out);
        } else {
            std::memcpy(out + written, packed + begin, size * sizeof *out);
        }
        words[i] = written;
        written += size;
    }
    words[rows] = written;
}

// Ids of 32 bits become 64 in place, from the last one down, written past the caches.
void widen(std::int64_t* samples, std::int64_t count) {
    auto* ids = reinterpret_cast<std::uint32_t*>(samples);
    std::int64_t i = count;
#ifdef __SSE2__
    for (; i > 0 && reinterpret_cast<std::uintptr_t>(samples + i) % 16 != 0; --i) {
        samples[i - 1] = ids[i - 1];
    }
    for (; i >= 4; i -= 4) {
        const __m128i zero = _mm_setzero_si128();
        const auto four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ids + i - 4));
        auto* to = reinterpret_cast<__m128i*>(samples + i - 4);
        _mm_stream_si128(to + 1, _mm_unpackhi_epi32(four, zero));
        _mm_stream_si128(to, _mm_unpacklo_epi32(four, zero));
    }
    _mm_sfence();
#endif
    for (; i > 0; --i) {
        samples[i - 1] = ids[i - 1];
    }
}

}  // namespace

void lay_out(const Plan& plan, const Seed* seed, std::int64_t count, std::int64_t skipped,
             std::int64_t* samples, std::int64_t* row_offsets) {
    auto* ids = reinterpret_cast<std::uint32_t*>(samples);
    std::uint32_t* packed = ids + count;
    const std::int64_t packed_count = count - skipped;
    Buffer<std::uint32_t> begins = measure_rows(plan, row_offsets);
    deal(plan, ids + skipped, begins.data(), packed);
    if (seed != nullptr) {
        Xoshiro256 random(*seed);
        shuffle(row_offsets, static_cast<std::size_t>(plan.rows), random);
    }
    gather(packed, packed_count, plan.rows, ids, row_offsets);
    widen(samples, packed_count);
}

}  // namespace hermes
