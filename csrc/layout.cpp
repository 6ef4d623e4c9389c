#include "layout.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "buffer.hpp"

namespace hermes {
namespace {

// Rows are shuffled as by Rao (1961) and Sandelius (1962): each goes to one of 256 groups by
// chance, and each group, small enough for a cache, is shuffled by Fisher and Yates.
constexpr std::size_t kGroups = 256;
constexpr std::size_t kRowsOfOneGroup = 4096;  // so few rows are shuffled as one group

struct Row {  // where its ids lie among the packed ones, and how many
    std::uint32_t begin;
    std::uint32_t size;
};

struct Arranged {
    Buffer<Row> rows;                                // group after group
    std::array<std::uint32_t, kGroups + 1> first{};  // of a group, in `rows`
    std::array<std::uint32_t, kGroups + 1> ids{};    // of a group, among the packed ids
};

// The size of each row, by its number in the plan.
Buffer<std::uint32_t> row_sizes(const Plan& plan) {
    Buffer<std::uint32_t> sizes(static_cast<std::size_t>(plan.rows));
    std::fill(sizes.begin(), sizes.end(), 0U);
    for (const Placement& p : plan.placements) {
        for (std::uint32_t row = p.first; row < p.first + p.rows; ++row) {
            sizes[row] += p.each;
        }
    }
    return sizes;
}

// Deals the rows to groups; `sizes` becomes where each row's ids begin.
Arranged arrange(Buffer<std::uint32_t>& sizes, Xoshiro256* random) {
    const std::size_t count = sizes.size();
    Arranged out{Buffer<Row>(count)};
    Buffer<std::uint8_t> groups(count + 8);
    for (std::size_t i = 0; i < count; i += 8) {
        const std::uint64_t eight =
            random != nullptr && count > kRowsOfOneGroup ? random->next() : 0;
        std::memcpy(groups.data() + i, &eight, 8);
    }
    for (std::size_t i = 0; random == nullptr && i < count; ++i) {  // groups of successive rows
        groups[i] = static_cast<std::uint8_t>(i * kGroups / count);
    }
    for (std::size_t i = 0; i < count; ++i) {
        ++out.first[groups[i] + 1U];
        out.ids[groups[i] + 1U] += sizes[i];
    }
    std::partial_sum(out.first.begin(), out.first.end(), out.first.begin());
    std::partial_sum(out.ids.begin(), out.ids.end(), out.ids.begin());
    auto next_row = out.first, next_id = out.ids;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t size = sizes[i], begin = next_id[groups[i]];
        out.rows[next_row[groups[i]]++] = {begin, size};
        next_id[groups[i]] += size;
        sizes[i] = begin;
    }
    return out;
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

// Puts sorted ids where their rows are; what they were sorted by is the order of the placements.
void deal(const Plan& plan, const std::uint32_t* ids, std::uint32_t* ends, std::uint32_t* packed) {
    for (const Placement& p : plan.placements) {
        const auto deal_some = p.each < kDealFew.size() ? kDealFew[p.each] : deal_many;
        deal_some(ids, p.each, ends + p.first, p.rows, packed);
        ids += std::size_t{p.rows} * p.each;
    }
}

}  // namespace

void lay_out(const Plan& plan, const Seed* seed, std::int64_t count, std::int64_t skipped,
             std::int64_t* samples, std::int64_t* row_offsets) {
    auto* ids = reinterpret_cast<std::uint32_t*>(samples);
    std::uint32_t* packed = ids + count;
    Xoshiro256 random(seed != nullptr ? *seed : Seed{1, 0, 0, 0});
    Buffer<std::uint32_t> starts = row_sizes(plan);
    Arranged arranged = arrange(starts, seed != nullptr ? &random : nullptr);
    deal(plan, ids + skipped, starts.data(), packed);

    // In its final place a group reaches at most to its own packed ids, so a copy of them is read.
    std::uint32_t largest = 0;
    for (std::size_t g = 0; g < kGroups; ++g) {
        largest = std::max(largest, arranged.ids[g + 1] - arranged.ids[g]);
    }
    constexpr std::uint32_t ahead = 8;  // ids are copied by eights
    Buffer<std::uint32_t> group(std::size_t{largest} + ahead);
    std::int64_t written = 0;
    const auto total = static_cast<std::int64_t>(arranged.ids[kGroups]);
    for (std::size_t g = 0; g < kGroups; ++g) {
        const std::uint32_t base = arranged.ids[g], size = arranged.ids[g + 1] - base;
        std::memcpy(group.data(), packed + base, size * sizeof(std::uint32_t));
        Row* rows = arranged.rows.data() + arranged.first[g];
        const std::uint32_t row_count = arranged.first[g + 1] - arranged.first[g];
        if (seed != nullptr) {
            shuffle(rows, row_count, random);
        }
        const std::int64_t group_end = written + size;
        for (std::uint32_t i = 0; i < row_count; ++i) {
            const std::uint32_t* from = group.data() + (rows[i].begin - base);
            std::int64_t* to = samples + written;
            *row_offsets++ = written;
            if (rows[i].size <= ahead && written + ahead <= group_end) {
                for (std::uint32_t j = 0; j < ahead; ++j) {
                    to[j] = from[j];
                }
            } else {
                std::copy_n(from, rows[i].size, to);
            }
            written += rows[i].size;
        }
    }
    *row_offsets = total;
}

}  // namespace hermes
