// From a plan to its arrays: sample ids row after row, and where each row begins.
#pragma once

#include <cstdint>

#include "packing.hpp"
#include "random.hpp"

namespace hermes {

// Writes the ids of all placements, rows in packing order or, with a seed, shuffled, and rows + 1
// offsets into them.
//
// `samples` has room for `count` ids, and is the only large scratch: on entry its first 4 * count
// bytes hold the sorted ids, `skipped` of which are left out; the rest of it is overwritten.
void lay_out(const Plan& plan, const Seed* seed, std::int64_t count, std::int64_t skipped,
             std::int64_t* samples, std::int64_t* row_offsets);

}  // namespace hermes
