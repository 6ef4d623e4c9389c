#include "exact_gap.hpp"

#include <numeric>

namespace hermes {
namespace {

// What the search of one row, and of all together, may cost: a bad set ends as first fit would.
constexpr std::int64_t kStepsOfRow = 1 << 13;
constexpr std::int64_t kSteps = 1 << 25;

}  // namespace

Plan plan_by_exact_gap(const std::vector<LengthClass>& classes, const Limits& limits) {
    Plan plan;
    if (classes.empty()) {
        return plan;
    }
    std::vector<std::uint32_t> of_class;
    std::vector<Placement> placements;
    Search search(classes, limits, kStepsOfRow, kSteps);
    while (search.longest() != classes.size()) {
        const std::vector<Part>& parts = search.make_row();
        const std::int64_t rows = search.use(parts);
        for (const Part& part : parts) {
            of_class.push_back(part.of_class);
            placements.push_back({static_cast<std::uint32_t>(plan.rows),
                                  static_cast<std::uint32_t>(rows),
                                  static_cast<std::uint32_t>(part.samples)});
        }
        plan.rows += rows;
    }
    // By class, and in each by row: a counting sort.
    std::vector<std::uint32_t> starts(classes.size() + 1);
    for (const std::uint32_t c : of_class) {
        ++starts[c + 1];
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    plan.placements.resize(placements.size());
    for (std::size_t i = 0; i < placements.size(); ++i) {
        plan.placements[starts[of_class[i]]++] = placements[i];
    }
    return plan;
}

}  // namespace hermes
