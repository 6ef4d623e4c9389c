// From a plan to its arrays: sample ids row after row, and where each row begins.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing.hpp"
#include "random.hpp"
#include "sorting.hpp"

namespace hermes {

// How many words of 32 bits `lay_out` needs where it leaves the samples, and where in them the
// spare lies that sort_lengths takes.
std::size_t layout_words(const Lengths& lengths, const Scan& scanned);
std::uint32_t* spare_in(std::int64_t* samples, const Lengths& lengths);

// Writes the ids of all placements, rows in packing order or, with a seed, shuffled, and rows + 1
// offsets into them; the first ids of the sorted, which are too long, into `dropped`.
//
// `samples` is the only large scratch, unless most samples have nearly one length or stand in one
// row; its spare is as sort_lengths left it.
void lay_out(const Plan& plan, const Seed* seed, const Lengths& lengths, const Scan& scanned,
             std::int64_t* samples, std::int64_t* row_offsets, std::int64_t* dropped,
             std::int64_t dropped_count);

}  // namespace hermes
