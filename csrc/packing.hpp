// First-fit and best-fit decreasing over integer lengths: whole samples into rows of one length.
//
// The plan depends only on how often each length occurs. Samples of one length form a class, rows
// with the same number of free tokens (room) and successive numbers form a run, and a class is
// placed into a run by one division. The result equals, row by row, the textbook algorithms:
// samples by falling length, equal lengths by id; first fit takes the lowest-numbered row with
// room, best fit the row with the least sufficient room, of several the lowest-numbered.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "buffer.hpp"

namespace hermes {

constexpr std::int64_t kMaxSamples = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t kMaxRowLength = std::int64_t{1} << 31;

enum class Strategy { first_fit, best_fit };
enum class TooLong { drop, truncate };

struct LengthClass {
    std::int64_t length;
    std::int64_t count;
};

struct Sorted {
    Buffer<std::uint32_t> ids;         // the dropped ones, then by falling length; ties by id
    std::vector<LengthClass> classes;  // by falling length, without the dropped
    std::int64_t dropped = 0;
};

// `rows` successive rows, from number `first` on, each take `each` samples of one class.
struct Placement {
    std::uint32_t first;
    std::uint32_t rows;
    std::uint32_t each;
};

struct Plan {
    std::vector<Placement> placements;  // in packing order: they use up Sorted::ids from its start
    std::int64_t rows = 0;
};

// Index of the first length outside [1, top], or -1.
std::int64_t find_outside(const std::int64_t* lengths, std::int64_t count, std::int64_t top);

// Lengths must be at least 1; those above row_length are dropped or counted as row_length.
Sorted sort_by_length(const std::int64_t* lengths, std::int64_t count, std::int64_t row_length,
                      TooLong too_long);

Plan make_plan(const std::vector<LengthClass>& classes, std::int64_t row_length, Strategy strategy);

// The larger of ceil(tokens / row_length) and the bound L2 of Martello and Toth (1990).
std::int64_t lower_bound(const std::vector<LengthClass>& classes, std::int64_t row_length);

// Writes sample ids row after row, and rows + 1 offsets; a seed (not all zero) shuffles the rows.
void lay_out(const Sorted& sorted, const Plan& plan, const std::array<std::uint64_t, 4>* seed,
             std::int64_t* samples, std::int64_t* row_offsets);

}  // namespace hermes
