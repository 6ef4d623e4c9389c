// Packing while samples arrive: a window at a time, in their order but for a few.
//
// A window and what was carried over make rows that are full to the last token. What is in none is
// carried into the next window, so the pool always holds samples of many lengths to choose from.
#pragma once

#include <cstdint>
#include <vector>

#include "lengths.hpp"
#include "packing.hpp"
#include "random.hpp"

namespace hermes {

struct Windows {
    std::int64_t window;  // samples that are looked at together
    Limits limits;
    Seed seed;
    std::int64_t first;  // number of the first window: with the seed, decides its rows' order
    bool finish;         // the last window is the last of all, after which nothing is carried
};

struct Windowed {
    std::int64_t samples = 0;               // in rows
    std::vector<std::int64_t> row_offsets;  // [rows + 1]
    std::vector<std::int64_t> carried;      // numbers of samples, as they came
    std::vector<std::int64_t> ages;         // of the carried: windows that each has waited
};

// The samples as they come have the numbers order[0], order[1] ... or, without it, 0, 1 ...; the
// first ages.size() were carried before, the others make whole windows or, with `finish`, any
// number. A length, at least 1, counts as one row if it is longer. Writes the numbers of those in
// rows, row after row, to `samples`, which has room for `count`.
Windowed pack_windows(const Lengths& lengths, const std::uint32_t* order, std::int64_t count,
                      const std::vector<std::int64_t>& ages, const Windows& windows,
                      std::int64_t* samples);

}  // namespace hermes
