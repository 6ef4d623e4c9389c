#include "exact_gap.hpp"

#include <numeric>

namespace hermes {
namespace {

// What the search of one row, and of all together, may cost: a bad set ends as first fit would.
constexpr std::int64_t kStepsOfRow = 1 << 13;
constexpr std::int64_t kSteps = 1 << 25;

}  // namespace

Plan RowList::plan(std::size_t classes) const {
    // By class, and in each by row: a counting sort.
    std::vector<std::uint32_t> starts(classes + 1);
    for (const std::uint32_t c : of_class_) {
        ++starts[c + 1];
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    Plan plan;
    plan.rows = rows_;
    reserve_in_huge_pages(plan.placements, placements_.size());
    plan.placements.resize(placements_.size());
    for (std::size_t i = 0; i < placements_.size(); ++i) {
        plan.placements[starts[of_class_[i]]++] = placements_[i];
    }
    return plan;
}

void add_by_exact_gap(const std::vector<LengthClass>& classes,
                      const std::vector<std::uint32_t>& of_class, const Limits& limits,
                      RowList& rows) {
    if (classes.empty()) {
        return;
    }
    Search search(ClassSlots(classes, limits.tokens), limits, kStepsOfRow);
    for (std::size_t c = 0; c < classes.size(); ++c) {
        search.add(c, classes[c].count);
    }
    search.allow(kSteps);
    while (search.longest() != classes.size()) {
        const std::vector<Part>& parts = search.make_row();
        rows.add(parts, search.use(parts), of_class);
    }
}

Plan plan_by_exact_gap(const std::vector<LengthClass>& classes, const Limits& limits) {
    std::vector<std::uint32_t> of_class(classes.size());
    std::iota(of_class.begin(), of_class.end(), 0U);
    RowList rows(classes.size());
    add_by_exact_gap(classes, of_class, limits, rows);
    return rows.plan(classes.size());
}

}  // namespace hermes
