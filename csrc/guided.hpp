// Plans for samples of which none is short enough to fill the holes that best fit leaves.
//
// A guide says which lengths share a row, and how often. Rows are made near its patterns: samples
// from the classes that are used up least, the last two such that they fill the row to its last
// token. What is left gets a guide of its own, and so on; exact gap packs the rest.
#pragma once

#include <cstdint>
#include <vector>

#include "packing.hpp"

namespace hermes {

struct Guided {
    Plan plan;
    std::int64_t lower_bound;  // of rows, by linear programming
};

Guided plan_guided(const std::vector<LengthClass>& classes, const Limits& limits);

}  // namespace hermes
