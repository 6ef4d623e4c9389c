#include "choice.hpp"

#include <algorithm>
#include <utility>

#include "guided.hpp"

namespace hermes {

Choice best_plan(const std::vector<LengthClass>& classes, const Limits& limits,
                 const std::vector<Strategy>& strategies) {
    Choice best{{}, strategies.front(), lower_bound(classes, limits)};
    for (const Strategy strategy : strategies) {
        const bool is_first = strategy == strategies.front();
        if (!is_first && best.plan.rows <= best.lower_bound) {
            break;
        }
        Plan plan;
        if (strategy == Strategy::guided) {
            Guided guided = plan_guided(classes, limits);
            best.lower_bound = std::max(best.lower_bound, guided.lower_bound);
            plan = std::move(guided.plan);
        } else {
            plan = make_plan(classes, limits, strategy);
        }
        if (is_first || plan.rows < best.plan.rows) {
            best.plan = std::move(plan);
            best.strategy = strategy;
        }
    }
    return best;
}

}  // namespace hermes
