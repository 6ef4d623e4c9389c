// Samples by falling length: what every decreasing strategy begins with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "lengths.hpp"

namespace hermes {

struct LengthClass {
    std::int64_t length;
    std::int64_t count;
};

struct Sorted {
    std::vector<LengthClass> classes;  // by falling length, without the dropped
    std::int64_t dropped = 0;          // how many of the ids, from their start, are too long
};

// What a scan of all lengths found; a length outside [1, row_length] is no error by itself.
struct Scan {
    std::int64_t top = 0;         // no length is above; at most row_length + 1, "too long"
    std::int64_t too_small = -1;  // index of the first length below 1, or -1
    std::int64_t too_long = -1;   // index of the first length above row_length, or -1
    // Where the ids of each length begin, from `top` down, and their end; empty where that many
    // lengths are possible that few samples share one.
    std::vector<std::uint32_t> begins;
};

// Lengths above row_length are counted as row_length with `truncate`.
Scan scan(const Lengths& lengths, std::int64_t row_length, bool truncate);

// How many words of `spare` are needed, of which those past the first `count` are no result's.
std::size_t spare_words(const Lengths& lengths, const Scan& scanned);

// The lengths that occur, and how many samples are longer than row_length. Where the scan did not
// count each length, all ids are sorted into `spare` for it.
Sorted sort_lengths(const Lengths& lengths, const Scan& scanned, std::int64_t row_length,
                    std::uint32_t* spare);

using Take = std::function<void(const std::uint32_t* ids, std::size_t count)>;

// Gives all ids by falling length, ties by id, some at a time, each time all those of a length;
// those that are too long come first. `spare` is what sort_lengths had.
void give_sorted(const Lengths& lengths, const Scan& scanned, std::uint32_t* spare,
                 const Take& take);

}  // namespace hermes
