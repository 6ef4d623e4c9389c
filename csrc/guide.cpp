#include "guide.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <utility>

#include "knapsack.hpp"
#include "knots.hpp"
#include "simplex.hpp"

namespace hermes {
namespace {

constexpr std::size_t kKnots = 128;    // about, where they are many classes apart
constexpr std::size_t kFewKnots = 64;  // where classes are few, or samples are counted
constexpr std::size_t kClassesApart = 16;
constexpr std::size_t kAllKnots = 512;    // so few classes are all knots if they have
constexpr double kManySamples = 8;        // so many samples each
constexpr std::size_t kAllItems = 1024;   // so few classes may all be in one row
constexpr std::int64_t kCells = 1 << 17;  // of a row
constexpr std::int64_t kFewCells = 1 << 8;
constexpr std::int64_t kTable = 1 << 25;  // steps of a knapsack that counts samples
constexpr std::int64_t kFewItems = 16;    // of such a knapsack: more keep its table small
constexpr int kRounds = 100;              // of new patterns
constexpr double kClose = 2e-5;           // nothing is worth more than one row and this: enough
constexpr std::size_t kNone = ~std::size_t{0};

// The most samples that fit into a row.
std::int64_t most_samples(const std::vector<LengthClass>& classes, const Limits& limits) {
    std::int64_t samples = 0, gap = limits.tokens;
    for (auto c = classes.rbegin(); c != classes.rend() && c->length <= gap; ++c) {
        const std::int64_t some = std::min(c->count, gap / c->length);
        samples += some;
        gap -= some * c->length;
    }
    return samples;
}

std::size_t knots_wanted(const std::vector<LengthClass>& classes, bool is_counted) {
    double count = 0;
    for (const LengthClass& c : classes) {
        count += static_cast<double>(c.count);
    }
    const std::size_t size = classes.size();
    if (size <= kAllKnots && count >= kManySamples * static_cast<double>(size)) {
        return size;
    }
    return is_counted ? kFewKnots : std::clamp(size / kClassesApart, kFewKnots, kKnots);
}

class Programme {
public:
    Programme(const std::vector<LengthClass>& classes, const Limits& limits)
        : classes_(classes),
          limits_(limits),
          is_counted_(limits.samples < most_samples(classes, limits)),
          knots_(classes, limits.tokens, knots_wanted(classes, is_counted_)),
          items_(knots_.classes()) {
        if (classes.size() <= kAllItems) {
            items_.resize(classes.size());
            std::iota(items_.begin(), items_.end(), 0U);
        }
        choose_cells();
        for (std::size_t c = 0; c < classes.size(); ++c) {
            if (c == 0 || cells_left(classes[c]) != cells_left(classes[c - 1])) {
                fillers_.push_back(c);
            }
        }
    }

    Guide solve(std::int64_t& work) {
        Guide guide;
        if (cells_ < std::min(kFewCells, limits_.tokens) || limits_.samples < 2) {
            return guide;
        }
        for (const LengthClass& c : classes_) {
            rows_ += static_cast<double>(c.count) * static_cast<double>(c.length) /
                     static_cast<double>(limits_.tokens);
        }
        Simplex simplex = start();
        Knapsack knapsack = knapsack_of([this](const LengthClass& c) { return cells_taken(c); });
        work -= simplex.improve(work);
        for (int round = 0; round < kRounds && work > 0; ++round) {
            worth_ = rising(simplex.duals());
            knapsack.fill(of_items(worth_));
            work -= knapsack.work() + static_cast<std::int64_t>(fillers_.size());
            if (!add_patterns(knapsack, simplex, work)) {
                break;
            }
            work -= simplex.improve(work);
        }
        worth_ = rising(simplex.duals());
        tell(simplex, guide);
        work -= knapsack.work() + static_cast<std::int64_t>(classes_.size());
        return guide;
    }

private:
    // All lengths to the token, or so that a half, a third ... a tenth of a row is a whole number
    // of cells and one: see least_cells.
    void choose_cells() {
        std::int64_t most = kCells;
        if (is_counted_) {
            const auto items = std::max(kFewItems, static_cast<std::int64_t>(items_.size()));
            most = std::min(most, kTable / items / limits_.samples);
        }
        const std::int64_t unit = most < 2520 ? 60 : 2520;
        cells_ = most >= limits_.tokens ? limits_.tokens : most / unit * unit - 1;
    }

    // Rows of one knot each, and what lets a sample take the place of a longer one or of none.
    Simplex start() {
        const std::size_t size = knots_.size();
        std::vector<double> wanted(size), diagonal(size);
        for (std::size_t c = 0; c < classes_.size(); ++c) {
            knots_.deal(c, static_cast<double>(classes_[c].count) / rows_, wanted);
        }
        for (std::size_t k = 0; k < size; ++k) {
            // A little more of each, all different: with ties the method might go in circles.
            wanted[k] += 1e-8 * (1 + std::fmod(0.6180339887 * static_cast<double>(k), 1.0));
            const std::int64_t samples =
                std::min(limits_.tokens / knots_.length(k), limits_.samples);
            diagonal[k] = static_cast<double>(samples);
            patterns_.push_back({{knots_.classes()[k], samples}});
        }
        Simplex simplex(wanted, diagonal);
        for (std::uint32_t k = 0; k < size; ++k) {
            if (k + 1 < size) {
                simplex.add(0, {{k, -1.0}, {k + 1, 1.0}});
            } else {
                simplex.add(0, {{k, -1.0}});
            }
            patterns_.emplace_back();
        }
        return simplex;
    }

    // Duals as a worth: where they are a little off, longer samples are worth as much as shorter.
    static std::vector<double> rising(std::vector<double> duals) {
        double least = 0;
        for (std::size_t k = duals.size(); k-- > 0;) {
            least = duals[k] = duals[k] > least ? std::min(duals[k], 1.0) : least;
        }
        return duals;
    }

    std::vector<double> of_items(const std::vector<double>& of_knots) const {
        std::vector<double> worth;
        for (const std::uint32_t c : items_) {
            worth.push_back(knots_.value(of_knots, c));
        }
        return worth;
    }

    // A pattern must fit into a row: a sample takes whole cells, and leaves whole cells.
    std::size_t cells_taken(const LengthClass& c) const {
        return static_cast<std::size_t>((c.length * cells_ + limits_.tokens - 1) / limits_.tokens);
    }
    std::size_t cells_left(const LengthClass& c) const {
        return static_cast<std::size_t>((limits_.tokens - c.length) * cells_ / limits_.tokens);
    }

    // For a bound, what fits into a row must fit into its cells: the dual-feasible function of
    // Fekete and Schepers (2001), by which k samples above a k-th of a row do not fit either.
    std::size_t least_cells(std::int64_t tokens) const {
        const std::int64_t cells = (tokens * (cells_ + 1) + limits_.tokens - 1) / limits_.tokens;
        return static_cast<std::size_t>(std::max<std::int64_t>(cells - 1, 0));
    }

    // Of what may stand beside one sample.
    template <class Width>
    Knapsack knapsack_of(const Width& width) const {
        std::vector<std::size_t> widths;
        for (const std::uint32_t c : items_) {
            widths.push_back(width(classes_[c]));
        }
        const std::int64_t most = is_counted_ ? limits_.samples - 1 : 0;
        return {std::move(widths), static_cast<std::size_t>(cells_),
                static_cast<std::size_t>(most)};
    }

    // Of each interval between knots the pattern that is worth most, if it is worth more than a
    // row; false if none is worth so much more that it matters.
    bool add_patterns(const Knapsack& knapsack, Simplex& simplex, std::int64_t& work) {
        std::vector<std::size_t> best(knots_.size(), kNone);
        std::vector<double> most(knots_.size());
        for (const std::size_t c : fillers_) {
            const double worth = knots_.value(worth_, c) + knapsack.most(cells_left(classes_[c]));
            const std::size_t k = knots_.at_or_above(c);
            if (worth > most[k]) {
                most[k] = worth;
                best[k] = c;
            }
        }
        const bool is_better = *std::max_element(most.begin(), most.end()) > 1 + kClose;
        for (std::size_t k = 0; k < best.size() && is_better; ++k) {
            if (most[k] > 1 + kClose / 10) {
                work -= add_pattern(best[k], knapsack, simplex);
            }
        }
        return is_better;
    }

    // What stands best beside a filler; how much work that was.
    std::int64_t add_pattern(std::size_t filler, const Knapsack& knapsack, Simplex& simplex) {
        std::vector<Part> parts{{static_cast<std::uint32_t>(filler), 1}};
        const auto beside = knapsack.items(cells_left(classes_[filler]));
        std::int64_t work = 0;
        for (const Knapsack::Some& some : beside) {
            parts.push_back({items_[some.item], some.times});
            work += 8 * some.times + static_cast<std::int64_t>(items_.size());
        }
        join_parts(parts);
        std::vector<double> sums(knots_.size());
        for (const Part& part : parts) {
            knots_.deal(part.of_class, static_cast<double>(part.samples), sums);
        }
        std::vector<Entry> entries;
        for (std::uint32_t k = 0; k < sums.size(); ++k) {
            if (sums[k] > 0) {
                entries.push_back({k, sums[k]});
            }
        }
        simplex.add(1, entries);
        patterns_.push_back(std::move(parts));
        return work;
    }

    void tell(const Simplex& simplex, Guide& guide) const {
        const std::size_t size = knots_.size();
        std::vector<double> places(size), passed(size);
        for (const auto& [column, amount] : simplex.solution()) {
            const std::vector<Part>& parts = patterns_[column];
            const double rows = std::min(amount * rows_, static_cast<double>(kMaxSamples));
            if (parts.empty()) {
                passed[column - size] = rows;
            } else {
                guide.patterns.push_back({parts, rows});
            }
            for (const Part& part : parts) {
                knots_.deal(part.of_class, rows * static_cast<double>(part.samples), places);
            }
        }
        for (std::size_t k = 0; k < size; ++k) {
            places[k] += k > 0 ? passed[k - 1] : 0;
            guide.passed.push_back(places[k] > 0 ? std::min(1.0, passed[k] / places[k]) : 0);
        }
        for (std::size_t c = 0; c < classes_.size(); ++c) {
            guide.worth.push_back(knots_.value(worth_, c));
        }
        guide.knots = knots_.classes();
        guide.bound = bound();
        guide.slack = (limits_.tokens + cells_ - 1) / cells_;
    }

    // What all samples are worth, in rows of the most that a row can be worth. What takes no cell
    // counts as worth nothing.
    double bound() const {
        std::vector<double> worth = worth_;
        for (std::size_t k = 0; k < worth.size(); ++k) {
            worth[k] = least_cells(knots_.length(k)) == 0 ? 0 : worth[k];
        }
        std::vector<double> items = of_items(worth);
        for (std::size_t item = 0; item < items.size(); ++item) {
            items[item] = least_cells(classes_[items_[item]].length) == 0 ? 0 : items[item];
        }
        Knapsack knapsack =
            knapsack_of([this](const LengthClass& c) { return least_cells(c.length); });
        knapsack.fill(items);
        const bool is_whole = items.size() == classes_.size();
        double all = 0, most = is_whole ? 0 : most_between(worth, knapsack);
        for (std::size_t c = 0; c < classes_.size(); ++c) {
            const double value = is_whole ? items[c] : knots_.value(worth, c);
            const std::int64_t left = limits_.tokens - classes_[c].length;
            all += value * static_cast<double>(classes_[c].count);
            most = std::max(most, value + knapsack.most(least_cells(left)));
        }
        return most > 0 ? all / most : 0;
    }

    // The most that a row can be worth with one sample of any length between two knots, be there
    // such a sample or not.
    double most_between(const std::vector<double>& worth, const Knapsack& knapsack) const {
        double most = 0;
        for (std::size_t k = 0; k + 1 < worth.size(); ++k) {
            if (knots_.classes()[k] + 1 == knots_.classes()[k + 1]) {
                continue;  // between which worth may jump
            }
            const std::int64_t above = knots_.length(k), below = knots_.length(k + 1);
            const double slope = (worth[k] - worth[k + 1]) / static_cast<double>(above - below);
            const std::size_t end = least_cells(limits_.tokens - below) + 1;
            for (std::size_t left = least_cells(limits_.tokens - above); left < end; ++left) {
                // The longest that leaves so many cells.
                const std::int64_t full =
                    static_cast<std::int64_t>(left) * limits_.tokens / (cells_ + 1);
                const std::int64_t length =
                    left == 0 ? above : std::min(above, limits_.tokens - full - 1);
                most = std::max(most, worth[k + 1] + slope * static_cast<double>(length - below) +
                                          knapsack.most(left));
            }
        }
        return most;
    }

    const std::vector<LengthClass>& classes_;
    Limits limits_;
    bool is_counted_;  // how many samples a row holds
    Knots knots_;
    std::vector<std::uint32_t> items_;  // classes of which a row may hold any number
    std::vector<std::size_t> fillers_;  // and of which it holds one: the longest for what is left
    std::int64_t cells_ = 0;
    double rows_ = 0;                          // if all were full
    std::vector<std::vector<Part>> patterns_;  // of each column; empty where it is no row
    std::vector<double> worth_;                // of the knots
};

}  // namespace

Guide make_guide(const std::vector<LengthClass>& classes, const Limits& limits,
                 std::int64_t& work) {
    return Programme(classes, limits).solve(work);
}

}  // namespace hermes
