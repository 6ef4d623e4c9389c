// What fits into a row and is worth most: each item any number of times.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace hermes {

class Knapsack {
public:
    // `widths` in cells; at most `most_items` of them together, or any number if that is 0.
    Knapsack(std::vector<std::size_t> widths, std::size_t cells, std::size_t most_items)
        : widths_(std::move(widths)), size_(cells + 1), layers_(most_items) {}

    // Items of no worth are not used; no other may have no width.
    void fill(const std::vector<double>& worth) {
        worth_ = worth;
        most_.assign(size_ * (layers_ + 1), 0.0);
        for (std::size_t layer = 0; layer < std::max<std::size_t>(layers_, 1); ++layer) {
            double* const from = &most_[layer * size_];
            double* const to = layers_ == 0 ? from : from + size_;
            for (std::size_t item = 0; item < widths_.size(); ++item) {
                if (worth_[item] > 0) {
                    add(from, to, widths_[item], worth_[item]);
                }
            }
        }
    }

    // The most that items in so many cells are worth.
    double most(std::size_t cells) const {
        return most_[layers_ * size_ + cells];
    }

    struct Some {
        std::size_t item;
        std::int64_t times;
    };

    // Items that are worth so much; one may come several times.
    std::vector<Some> items(std::size_t cells) const {
        std::vector<Some> found;
        std::size_t layer = layers_;
        while (most_[layer * size_ + cells] > 0) {
            const double wanted = most_[layer * size_ + cells];
            layer -= layers_ > 0 ? 1 : 0;
            if (found.empty() || with(found.back().item, layer, cells) < wanted) {
                std::size_t best = 0;
                for (std::size_t item = 1; item < widths_.size(); ++item) {
                    best = with(item, layer, cells) > with(best, layer, cells) ? item : best;
                }
                found.push_back({best, 0});
            }
            ++found.back().times;
            cells -= widths_[found.back().item];
        }
        return found;
    }

    // Elementary steps of one fill, which does several at a time.
    std::int64_t work() const {
        const std::size_t steps = widths_.size() * size_ * std::max<std::size_t>(layers_, 1);
        return static_cast<std::int64_t>(steps / 4);
    }

private:
    // In stretches that do not overlap, for the sake of vector units.
    void add(const double* from, double* to, std::size_t width, double worth) const {
        for (std::size_t start = width; start < size_; start += width) {
            const double* const __restrict before = from + (start - width);
            double* const __restrict here = to + start;
            const std::size_t count = std::min(width, size_ - start);
            for (std::size_t i = 0; i < count; ++i) {
                const double value = before[i] + worth;
                here[i] = value > here[i] ? value : here[i];
            }
        }
    }

    double with(std::size_t item, std::size_t layer, std::size_t cells) const {
        return worth_[item] > 0 && widths_[item] <= cells
                   ? most_[layer * size_ + cells - widths_[item]] + worth_[item]
                   : 0;
    }

    std::vector<std::size_t> widths_;
    std::size_t size_, layers_;
    std::vector<double> worth_;
    std::vector<double> most_;  // [layers + 1, size]: with so many items, in so many cells
};

}  // namespace hermes
