// Functions of length that run straight between some lengths, the knots.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sorting.hpp"

namespace hermes {

class Knots {
public:
    // About `wanted` of the classes, or all of them.
    Knots(const std::vector<LengthClass>& classes, std::int64_t row_length, std::size_t wanted)
        : classes_(classes) {
        choose(pieces(row_length), wanted);
        place();
    }

    std::size_t size() const {
        return of_class_.size();
    }

    // Their classes, rising.
    const std::vector<std::uint32_t>& classes() const {
        return of_class_;
    }

    std::int64_t length(std::size_t k) const {
        return classes_[of_class_[k]].length;
    }

    // The knot at a class or, where there is none, the next longer one.
    std::size_t at_or_above(std::size_t c) const {
        return places_[c].knot;
    }

    // Deals samples of a class to the knots around it.
    void deal(std::size_t c, double samples, std::vector<double>& to_knots) const {
        const Place& place = places_[c];
        to_knots[place.knot] += samples * (1 - place.below);
        if (place.below > 0) {
            to_knots[place.knot + 1] += samples * place.below;
        }
    }

    // The function's value at a class, from those at the knots.
    double value(const std::vector<double>& at_knots, std::size_t c) const {
        const Place& place = places_[c];
        const double above = at_knots[place.knot];
        return place.below > 0 ? above + place.below * (at_knots[place.knot + 1] - above) : above;
    }

private:
    struct Place {
        std::uint32_t knot;
        double below;  // how much of the way to the next knot
    };

    // Where a function may jump: by how many samples a row takes, alone or beside the shortest.
    std::vector<char> pieces(std::int64_t row_length) const {
        std::vector<char> starts(classes_.size() + 1);
        const auto cut = [&](std::int64_t length) {
            const auto at =
                std::partition_point(classes_.begin(), classes_.end(),
                                     [length](const LengthClass& c) { return c.length > length; });
            starts[static_cast<std::size_t>(at - classes_.begin())] = 1;
        };
        for (std::int64_t k = 1; k <= 10; ++k) {
            cut(row_length / k);
        }
        for (std::int64_t k = 1; k <= 3; ++k) {
            cut((row_length - classes_.back().length) / k);
        }
        starts.front() = starts.back() = 1;
        return starts;
    }

    // Both ends of each piece, and inside it as many as its share of samples and of lengths.
    void choose(const std::vector<char>& starts, std::size_t wanted) {
        const std::size_t size = classes_.size();
        double count = 0;
        for (const LengthClass& c : classes_) {
            count += static_cast<double>(c.count);
        }
        const auto range =
            static_cast<double>(classes_.front().length - classes_.back().length + 1);
        double sum = 0, next = 0;
        for (std::size_t c = 0; c < size; ++c) {
            if (starts[c] != 0 || starts[c + 1] != 0 || sum >= next || size <= wanted) {
                of_class_.push_back(static_cast<std::uint32_t>(c));
                next = sum + 1 / static_cast<double>(wanted);
            }
            const std::int64_t step =
                c + 1 < size ? classes_[c].length - classes_[c + 1].length : 0;
            sum += static_cast<double>(classes_[c].count) / count / 2 +
                   static_cast<double>(step) / range / 2;
        }
    }

    void place() {
        std::uint32_t k = 0;
        for (std::size_t c = 0; c < classes_.size(); ++c) {
            k += k + 1 < of_class_.size() && of_class_[k + 1] == c ? 1 : 0;
            const auto way = static_cast<double>(length(k) - classes_[c].length);
            places_.push_back(
                {k, way > 0 ? way / static_cast<double>(length(k) - length(k + 1)) : 0});
        }
    }

    const std::vector<LengthClass>& classes_;
    std::vector<std::uint32_t> of_class_;
    std::vector<Place> places_;  // of each class
};

}  // namespace hermes
