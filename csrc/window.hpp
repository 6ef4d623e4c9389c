// Packing while samples arrive: a window at a time, in their order but for a few.
//
// A window and what was carried over make rows that are full to the last token. What is in none is
// carried into the next window, so the pool always holds samples of many lengths to choose from.
#pragma once

#include <cstdint>
#include <vector>

#include "packing.hpp"
#include "random.hpp"

namespace hermes {

struct Windowed {
    std::vector<std::int64_t> samples;      // places in the input, row after row
    std::vector<std::int64_t> row_offsets;  // [rows + 1]
    std::vector<std::int64_t> carried;      // places in the input, rising
    std::vector<std::int64_t> ages;         // of the carried: windows that each has waited
};

// The first ages.size() lengths were carried before, the others are new: whole windows, and with
// `finish` the last of all, after which nothing is carried. Rows of a window stand in an order that
// the seed and the window's number, counted from `first_window`, decide.
Windowed pack_windows(const std::int64_t* lengths, std::int64_t count,
                      const std::vector<std::int64_t>& ages, std::int64_t window,
                      const Limits& limits, const Seed& seed, std::uint64_t first_window,
                      bool finish);

}  // namespace hermes
