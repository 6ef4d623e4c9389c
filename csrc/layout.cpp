#include "layout.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "buffer.hpp"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace hermes {
namespace {

constexpr std::uint32_t kFew = 8;  // so many ids of a row are copied at once, needed or not
constexpr std::size_t kMostBuckets = 1024;

// Where each row's ids begin, in packing order, and their end.
Buffer<std::uint32_t> measure_rows(const Plan& plan) {
    // First how much larger each row is than the one before it.
    Buffer<std::uint32_t> begins(static_cast<std::size_t>(plan.rows) + 1);
    std::fill(begins.begin(), begins.end(), 0U);
    for (const Placement& p : plan.placements) {
        begins[p.first] += p.each;
        begins[p.first + p.rows] -= p.each;
    }
    std::uint32_t size = 0, begin = 0;
    for (std::uint32_t& row : begins) {
        size += row;
        row = begin;
        begin += size;
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
class Dealer {
public:
    Dealer(const Plan& plan, std::uint32_t* ends, std::uint32_t* packed)
        : all_(plan.placements), ends_(ends), packed_(packed) {}

    // Those of whole placements.
    void take(const std::uint32_t* ids, std::size_t count) {
        for (const std::uint32_t* const end = ids + count; ids < end; ++next_) {
            expect();
            const auto [first, rows, each] = all_[next_];
            const auto deal_some = each < kDealFew.size() ? kDealFew[each] : deal_many;
            deal_some(ids, each, ends_ + first, rows, packed_);
            ids += std::size_t{rows} * each;
        }
    }

private:
    // The rows of a placement lie together, those of the next anywhere: first their ends are asked
    // for, then where those point. Of few rows that takes longer than it spares.
    void expect() const {
        constexpr std::uint32_t many = 32;
        constexpr std::size_t soon = 8, later = 16;  // placements ahead
        if (next_ + later < all_.size() && all_[next_ + later].rows >= many) {
            expect_writes(ends_ + all_[next_ + later].first, all_[next_ + later].rows);
        }
        if (next_ + soon < all_.size() && all_[next_ + soon].rows >= many) {
            const auto [first, rows, each] = all_[next_ + soon];
            expect_writes(packed_ + ends_[first], ends_[first + rows - 1] + each - ends_[first]);
        }
    }

    const std::vector<Placement>& all_;
    std::uint32_t* ends_;  // of each row, so far
    std::uint32_t* packed_;
    std::size_t next_ = 0;
};

// Ids of 32 bits become 64 in place, from the last one down.
void widen(std::int64_t* samples, std::size_t count) {
    std::array<std::uint32_t, 4096> block;
    const auto* ids = reinterpret_cast<const std::uint32_t*>(samples);
    while (count > 0) {
        const std::size_t some = std::min(count, block.size());
        count -= some;
        std::copy_n(ids + count, some, block.data());
        std::copy_n(block.data(), some, samples + count);
    }
}

// Rows are shuffled where a cache holds them: each goes to a bucket by chance, and within a bucket
// Fisher and Yates decide. Every order is as likely as another (Rao, 1961; Sandelius, 1962). In a
// bucket, the last id of each row is marked by the bit that no id has.
constexpr std::uint32_t kLast = std::uint32_t{1} << 31;

std::size_t bucket_count(std::size_t rows, std::size_t ids) {
    constexpr std::size_t most_rows = 1 << 12, most_ids = 1 << 15;
    std::size_t count = 1;
    while (count < kMostBuckets && (rows / count > most_rows || ids / count > most_ids)) {
        count *= 2;
    }
    return count;
}

// Calls f(bucket, begin, end) for each row, with its place in `packed`.
template <class F>
void draw_buckets(const std::uint32_t* ends, std::size_t rows, std::size_t count,
                  Xoshiro256& random, F f) {
    std::uint32_t begin = 0;
    for (std::size_t row = 0; row < rows;) {
        std::uint64_t word = count == 1 ? 0 : random.next();
        for (const std::size_t last = std::min(rows, row + 4); row < last; ++row, word >>= 16) {
            f(word & (count - 1), begin, ends[row]);
            begin = ends[row];
        }
    }
}

// Copies each row to the end of its bucket. A bucket begins `kFew` words after the one before it.
void fill_bucket(const std::uint32_t* __restrict row, std::uint32_t size,
                 std::uint32_t* __restrict to) {
    constexpr std::uint32_t line = 64 / sizeof *to;
    if (size <= kFew) {
        std::memcpy(to, row, kFew * sizeof *to);
    } else {
        std::memcpy(to, row, size * sizeof *to);
    }
    to[size - 1] = row[size - 1] | kLast;
    __builtin_prefetch(to + size + line, 1);
}

#ifdef __SSE2__
// Of four ids, one bit each: is it the last of its row?
inline unsigned last_of(const std::uint32_t* ids) {
    return static_cast<unsigned>(
        _mm_movemask_ps(_mm_loadu_ps(reinterpret_cast<const float*>(ids))));
}
#endif

// Writes where each row of a bucket begins, and gives their number.
std::size_t find_rows(const std::uint32_t* ids, std::size_t count, std::uint32_t* begins) {
    std::size_t rows = 0, i = 0;
    begins[0] = 0;
#ifdef __SSE2__
    for (; i + 32 <= count; i += 32) {
        std::uint32_t last = 0;
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
            last |= last_of(ids + i + 4 * k) << (4 * k);
        }
        for (; last != 0; last &= last - 1) {
            begins[++rows] = static_cast<std::uint32_t>(i) + __builtin_ctz(last) + 1;
        }
    }
#endif
    for (; i < count; ++i) {
        begins[rows + 1] = static_cast<std::uint32_t>(i) + 1;
        rows += ids[i] >> 31;
    }
    return rows;
}

// Copies a row, and up to kFew - 1 elements more. Gives its end.
inline std::int64_t* widen_row(const std::uint32_t* ids, std::int64_t* out) {
#ifdef __SSE2__
    static_assert(kFew == 8);
    const __m128i zero = _mm_setzero_si128(), mask = _mm_set1_epi32(static_cast<int>(~kLast));
    for (;; ids += 8, out += 8) {
        for (int k = 0; k < 8; k += 4) {
            const auto four =
                _mm_and_si128(mask, _mm_loadu_si128(reinterpret_cast<const __m128i*>(ids + k)));
            auto* to = reinterpret_cast<__m128i*>(out + k);
            _mm_storeu_si128(to, _mm_unpacklo_epi32(four, zero));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi32(four, zero));
        }
        if (const unsigned last = last_of(ids) | last_of(ids + 4) << 4; last != 0) {
            return out + __builtin_ctz(last) + 1;
        }
    }
#else
    for (;; ++ids) {
        *out++ = *ids & ~kLast;
        if (*ids & kLast) {
            return out;
        }
    }
#endif
}

// Shuffles the rows of each bucket and copies them out, one after another.
void empty_buckets(const std::vector<std::size_t>& begins, const std::uint32_t* ids,
                   Xoshiro256& random, std::int64_t* samples, std::int64_t* row_offsets) {
    constexpr std::size_t ahead = 512;
    std::size_t most = 0;
    for (std::size_t i = 0; i + 1 < begins.size(); ++i) {
        most = std::max(most, begins[i + 1] - begins[i]);
    }
    Buffer<std::uint32_t> order(most + 1), copy(most);
    std::int64_t* out = samples;
    for (std::size_t i = 0; i + 1 < begins.size(); ++i) {
        const std::uint32_t* from = ids + begins[i];
        const std::size_t count = begins[i + 1] - begins[i] - kFew;
        if (reinterpret_cast<std::uint32_t*>(out + count + kFew) > from) {
            std::copy_n(from, count + kFew, copy.data());
            from = copy.data();
        }
        const std::size_t rows = find_rows(from, count, order.data());
        shuffle(order.data(), rows, random);
        for (std::size_t row = 0; row < rows; ++row) {
            *row_offsets++ = out - samples;
            out = widen_row(from + order[row], out);
            __builtin_prefetch(out + ahead, 1);
        }
    }
    *row_offsets = out - samples;
}

}  // namespace

std::size_t layout_words(const Lengths& lengths, const Scan& scanned) {
    const auto count = static_cast<std::size_t>(lengths.count);
    const std::size_t in_buckets = count + kFew * bucket_count(count, count);
    return count + kFew + std::max(spare_words(lengths, scanned), in_buckets);
}

std::uint32_t* spare_in(std::int64_t* samples, const Lengths& lengths) {
    // The last row is read beyond its end, which must not be where it is copied to.
    return reinterpret_cast<std::uint32_t*>(samples) + lengths.count + kFew;
}

void lay_out(const Plan& plan, const Seed* seed, const Lengths& lengths, const Scan& scanned,
             std::int64_t* samples, std::int64_t* row_offsets, std::int64_t* dropped,
             std::int64_t dropped_count) {
    auto* const packed = reinterpret_cast<std::uint32_t*>(samples);
    std::uint32_t* const spare = spare_in(samples, lengths);
    Buffer<std::uint32_t> ends = measure_rows(plan);
    Dealer dealer(plan, ends.data(), packed);
    give_sorted(lengths, scanned, spare, [&](const std::uint32_t* ids, std::size_t count) {
        const std::size_t too_long = std::min<std::size_t>(count, dropped_count);
        dropped = std::copy_n(ids, too_long, dropped);
        dropped_count -= too_long;
        dealer.take(ids + too_long, count - too_long);
    });
    const auto rows = static_cast<std::size_t>(plan.rows);
    const std::size_t packed_count = ends[rows];
    if (seed == nullptr) {
        row_offsets[0] = 0;
        std::copy_n(ends.data(), rows, row_offsets + 1);
        widen(samples, packed_count);
        return;
    }
    const std::size_t buckets = bucket_count(rows, packed_count);
    Xoshiro256 random(*seed), again(*seed);
    std::vector<std::size_t> begins(buckets + 1, kFew);
    begins[0] = 0;
    draw_buckets(ends.data(), rows, buckets, random,
                 [&](std::size_t bucket, std::uint32_t begin, std::uint32_t end) {
                     begins[bucket + 1] += end - begin;
                 });
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    std::vector<std::size_t> next = begins;
    draw_buckets(ends.data(), rows, buckets, again,
                 [&](std::size_t bucket, std::uint32_t begin, std::uint32_t end) {
                     fill_bucket(packed + begin, end - begin, spare + next[bucket]);
                     next[bucket] += end - begin;
                 });
    empty_buckets(begins, spare, random, samples, row_offsets);
}

}  // namespace hermes
