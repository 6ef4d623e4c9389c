// Several plans of the same samples, of which the one with the fewest rows is kept.
#pragma once

#include <cstdint>
#include <vector>

#include "packing.hpp"

namespace hermes {

struct Choice {
    Plan plan;
    Strategy strategy;
    std::int64_t lower_bound;  // the largest that is known
};

// Tries the strategies in turn until a plan has no more rows than the lower bound.
Choice best_plan(const std::vector<LengthClass>& classes, const Limits& limits,
                 const std::vector<Strategy>& strategies);

}  // namespace hermes
