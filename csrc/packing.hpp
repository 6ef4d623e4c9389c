// Plans of whole samples in rows of one length, made from how often each length occurs.
//
// Samples of one length form a class, rows with the same number of free tokens (room) and
// successive numbers form a run, and a class is placed into a run by one division. First fit and
// best fit equal, row by row, the textbook algorithms: samples by falling length, equal lengths by
// id; first fit takes the lowest-numbered row with room, best fit the row with the least sufficient
// room, of several the lowest-numbered.
#pragma once

#include <cstdint>
#include <vector>

#include "sorting.hpp"

namespace hermes {

enum class Strategy { first_fit, best_fit, exact_gap, guided };

struct Limits {  // of a row
    std::int64_t tokens;
    std::int64_t samples;  // kMaxSamples where nobody asked
};

// `rows` successive rows, from number `first` on, each take `each` samples of one class.
struct Placement {
    std::uint32_t first;
    std::uint32_t rows;
    std::uint32_t each;
};

struct Plan {
    std::vector<Placement> placements;  // by class: they use up the sorted ids from their start
    std::int64_t rows = 0;
};

Plan make_plan(const std::vector<LengthClass>& classes, const Limits& limits, Strategy strategy);

// Each row starts with the longest sample left and looks for one, two, three ... samples that fill
// it to the last token, in a bounded search; where there are none, for mixtures of two lengths and
// one sample more that do; and then for those that leave least.
Plan plan_by_exact_gap(const std::vector<LengthClass>& classes, const Limits& limits);

// The largest of ceil(tokens / row_length), ceil(samples / most samples) and the bound L2 of
// Martello and Toth (1990).
std::int64_t lower_bound(const std::vector<LengthClass>& classes, const Limits& limits);

// The first class that fits into a room, found in a table: classes are in falling order.
class FirstFitting {
public:
    FirstFitting(const std::vector<LengthClass>& classes, std::int64_t row_length);
    std::uint32_t operator()(std::int64_t room) const {
        const auto k = static_cast<std::size_t>(room >> shift_);
        std::uint32_t low = starts_[k];
        if (shift_ == 0) {
            return low;
        }
        std::uint32_t high = k == 0 ? end_ : starts_[k - 1];
        while (low < high) {
            const std::uint32_t middle = low + (high - low) / 2;
            if (classes_[middle].length > room) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }

private:
    const LengthClass* classes_;
    std::uint32_t end_;
    std::vector<std::uint32_t> starts_;  // [k]: the first class that fits the largest room of k
    int shift_ = 0;
};

}  // namespace hermes
