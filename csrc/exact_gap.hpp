// The search for samples that fill a row to its last token.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bit_tree.hpp"
#include "buffer.hpp"
#include "packing.hpp"
#include "slots.hpp"

namespace hermes {

// Bounds of the search. A row takes what fits more than kFine times at once; of the rest, at each
// of kDepth levels, kBranches samples are tried, and under each kPairs pairs. Where that finds
// nothing, kMixtures of what was taken at once with another class are tried. Both count as steps.
constexpr std::int64_t kFine = 4;
constexpr std::size_t kDepth = 4;
constexpr int kBranches = 16;
constexpr int kPairs = 256;
constexpr std::int64_t kMixtures = 1 << 12;

// Of numbers below 2^32: those of 64 bits take many processors several times as long to divide.
inline std::int64_t quotient(std::int64_t a, std::int64_t b) {
    return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
}

struct Part {  // of a row
    std::uint32_t of_class;
    std::int64_t samples;
};

// Sorts parts by class, and makes those of one class one.
inline void join_parts(std::vector<Part>& parts) {
    std::sort(parts.begin(), parts.end(),
              [](const Part& a, const Part& b) { return a.of_class < b.of_class; });
    std::size_t size = 0;
    for (const Part& part : parts) {
        if (size > 0 && parts[size - 1].of_class == part.of_class) {
            parts[size - 1].samples += part.samples;
        } else {
            parts[size++] = part;
        }
    }
    parts.resize(size);
}

// Rows as they are made, one kind after another.
class RowList {
public:
    explicit RowList(std::size_t placements = 0) {
        reserve_in_huge_pages(of_class_, placements);
        reserve_in_huge_pages(placements_, placements);
    }
    // `rows` rows of these parts, whose classes are numbers of `of_class`.
    void add(const std::vector<Part>& parts, std::int64_t rows,
             const std::vector<std::uint32_t>& of_class) {
        for (const Part& part : parts) {
            of_class_.push_back(of_class[part.of_class]);
            placements_.push_back({static_cast<std::uint32_t>(rows_),
                                   static_cast<std::uint32_t>(rows),
                                   static_cast<std::uint32_t>(part.samples)});
        }
        rows_ += rows;
    }
    std::int64_t rows() const {
        return rows_;
    }
    Plan plan(std::size_t classes) const;

private:
    std::vector<std::uint32_t> of_class_;  // of each placement
    std::vector<Placement> placements_;
    std::int64_t rows_ = 0;
};

// Adds rows of all these samples by exact gap.
void add_by_exact_gap(const std::vector<LengthClass>& classes,
                      const std::vector<std::uint32_t>& of_class, const Limits& limits,
                      RowList& rows);

// Makes rows of the samples that are left, one after another. Classes go by their slots.
template <class Slots>
class Search {
public:
    // `steps` bounds the search of a row; without steps left, a row takes the longest samples that
    // fit, as first fit would.
    Search(const Slots& slots, const Limits& limits, std::int64_t steps)
        : slots_(slots), present_(slots.size()), limits_(limits), steps_of_row_(steps) {
        reserve_in_huge_pages(left_, slots.size());
        left_.resize(slots.size());
    }

    // So many samples of a class more.
    void add(std::size_t c, std::int64_t samples) {
        put_back(c, samples);
        last_ = std::max(last_, c);
    }

    // Bounds the search of all rows from here on.
    void allow(std::int64_t steps) {
        all_steps_ = steps;
    }

    // The class of the longest sample left, or the number of classes when there is none.
    std::size_t longest() const {
        return present_.empty() ? present_.end() : present_.first();
    }

    // Samples of a class.
    std::int64_t left(std::size_t c) const {
        return left_[c];
    }

    // Takes all samples of a class out of the game.
    void clear(std::size_t c) {
        left_[c] = 0;
        present_.remove(c);
    }

    // Tokens that the last row left free.
    std::int64_t gap() const {
        return least_gap_;
    }

    // The parts, by falling length, of a row that begins with the longest sample left.
    const std::vector<Part>& make_row() {
        begin_row();
        return finish_row(longest());
    }

    // Those of a row that begins with these parts, which fit.
    const std::vector<Part>& make_row_with(const std::vector<std::size_t>& classes) {
        begin_row();
        for (const std::size_t c : classes) {
            gap_ -= slots_.length(c) * take(c, 1);
        }
        return finish_row(places_ > 0 ? largest(gap_, 0) : slots_.size());
    }

    // Takes one sample of class `c` out of the game.
    void set_aside(std::size_t c) {
        take(c, 1);
        row_.clear();
    }

    // Takes samples for as many rows of these parts as there can be; how many.
    std::int64_t use(const std::vector<Part>& parts) {
        std::int64_t times = kMaxSamples;
        for (const Part& part : parts) {
            const std::int64_t all = left(part.of_class);
            if (all < 2 * part.samples) {
                times = 1;
                break;
            }
            times = std::min(times, quotient(all, part.samples));
        }
        for (const Part& part : parts) {
            remove(part.of_class, times * part.samples);
        }
        return times;
    }

private:
    void begin_row() {
        if (!present_.has(last_)) {
            last_ = present_.last();
        }
        places_ = limits_.samples;
        gap_ = limits_.tokens;
    }

    const std::vector<Part>& finish_row(std::size_t c) {
        while (c != present_.end() && places_ > 0 &&
               (row_.empty() || gap_ >= (kFine + 1) * slots_.length(c))) {
            const std::int64_t length = slots_.length(c);
            const std::int64_t many =
                gap_ < (kFine + 1) * length ? 1 : quotient(gap_, length) - (kFine - 1);
            gap_ -= length * take(c, std::min({many, left(c), places_}));
            c = largest(gap_, c);
        }
        least_gap_ = gap_;
        tail_ = 0;
        const bool found = gap_ == 0 || within(steps_of_row_, [&] { return search(gap_, c, 0); });
        best_ = row_;
        for (std::size_t i = 0; i < tail_; ++i) {
            best_.push_back({best_path_[i], 1});
        }
        if (!found && !within(kMixtures, [&] { return mix(gap_); }) &&
            least_gap_ >= slots_.length(last_)) {
            fill_up();
        }
        while (!row_.empty()) {
            give_back();
        }
        join_parts(best_);
        return best_;
    }

    // Whether it finds something in so many steps, which it counts down.
    template <typename Find>
    bool within(std::int64_t steps, const Find& find) {
        const std::int64_t allowed = std::min(steps, all_steps_);
        steps_ = allowed;
        const bool found = find();
        all_steps_ -= allowed - std::max<std::int64_t>(steps_, 0);
        return found;
    }

    // The longest class from `from` on that fits and has samples.
    std::size_t largest(std::int64_t gap, std::size_t from) const {
        return present_.next(std::max<std::size_t>(slots_.fitting(gap), from));
    }

    void put_back(std::size_t c, std::int64_t samples) {
        left_[c] += static_cast<std::uint32_t>(samples);
        present_.add(c);
    }

    void remove(std::size_t c, std::int64_t samples) {
        left_[c] -= static_cast<std::uint32_t>(samples);
        if (left_[c] == 0) {
            present_.remove(c);
        }
    }

    std::int64_t take(std::size_t c, std::int64_t samples) {
        row_.push_back({static_cast<std::uint32_t>(c), samples});
        places_ -= samples;
        remove(c, samples);
        return samples;
    }

    void give_back() {
        const Part part = row_.back();
        row_.pop_back();
        places_ += part.samples;
        put_back(part.of_class, part.samples);
    }

    // Is it the best row seen, one of `depth` samples on the path and so many more?
    bool keep(std::int64_t gap, std::size_t depth, std::size_t a, std::size_t b, std::size_t more) {
        if (gap >= least_gap_) {
            return false;
        }
        least_gap_ = gap;
        best_path_ = path_;
        best_path_[depth] = static_cast<std::uint32_t>(a);
        best_path_[depth + 1] = static_cast<std::uint32_t>(b);
        tail_ = depth + more;
        return gap == 0;
    }

    // Looks for samples, from class `from` on, that fill the gap; keeps the best row seen.
    bool search(std::int64_t gap, std::size_t from, std::size_t depth) {
        const std::size_t c = largest(gap, from);
        if (c == present_.end() || places_ == 0) {
            return false;
        }
        if (keep(gap - slots_.length(c), depth, c, c, 1)) {
            return true;
        }
        const std::int64_t shortest = slots_.length(last_);
        if (gap < 2 * shortest || places_ < 2) {
            return false;
        }
        const std::size_t start = largest(gap - shortest, from);
        std::size_t a = start;
        for (int i = 0; i < kPairs && a != present_.end() && 2 * slots_.length(a) >= gap; ++i) {
            if (--steps_ < 0) {
                return false;
            }
            const std::int64_t rest = gap - slots_.length(a);
            const std::size_t b = slots_.find(rest);
            if (b < slots_.size() && present_.has(b) && (a != b || left_[a] > 1)) {
                return keep(0, depth, a, b, 2);
            }
            a = present_.next(a + 1);
        }
        if (depth == kDepth || places_ < 3) {
            return false;
        }
        a = start;
        for (int i = 0; i < kBranches && a != present_.end(); ++i) {
            path_[depth] = static_cast<std::uint32_t>(a);
            --places_;
            remove(a, 1);
            const bool found = search(gap - slots_.length(a), a, depth + 1);
            put_back(a, 1);
            ++places_;
            if (found || --steps_ < 0) {
                return found;
            }
            a = present_.next(a + 1);
        }
        return false;
    }

    // Where samples were taken many at once, looks for other numbers of them: short samples of
    // nearly one length fill no row to its end, but mixtures of two lengths do.
    bool mix(std::int64_t gap) {
        while (!row_.empty()) {
            const Part part = row_.back();
            const std::int64_t length = slots_.length(part.of_class);
            give_back();
            gap += part.samples * length;
            if (part.samples > 1 && gap <= places_ * length && mix(gap, part.of_class)) {
                return true;
            }
        }
        return false;
    }

    // Fills the gap with some samples of class `c`, some of a shorter one, and one of any.
    bool mix(std::int64_t gap, std::size_t c) {
        const std::int64_t length = slots_.length(c), shortest = slots_.length(last_);
        for (std::int64_t many = std::min({quotient(gap, length), left(c), places_}); many > 0;
             --many) {
            const std::int64_t rest = gap - many * length;
            std::size_t a = present_.next(c + 1);
            for (int i = 0; i < kPairs && rest >= shortest && a != present_.end(); ++i) {
                if (--steps_ < 0) {
                    return false;
                }
                const std::int64_t some =
                    std::min(quotient(rest - shortest, slots_.length(a)), left(a));
                const std::int64_t last = rest - some * slots_.length(a);
                const std::size_t b = slots_.find(last);
                if (many + some < places_ && b < slots_.size() &&
                    left(b) > (b == c ? many : 0) + (b == a ? some : 0)) {
                    take(c, many);
                    if (some > 0) {
                        take(a, some);
                    }
                    best_ = row_;
                    best_.push_back({static_cast<std::uint32_t>(b), 1});
                    least_gap_ = 0;
                    return true;
                }
                a = present_.next(a + 1);
            }
        }
        return false;
    }

    // Fills the best row up with the longest samples that fit, and then their like.
    void fill_up() {
        while (!row_.empty()) {
            give_back();
        }
        for (const Part& part : best_) {
            take(part.of_class, part.samples);
        }
        std::int64_t gap = least_gap_;
        std::size_t c = 0;
        while (places_ > 0 && (c = largest(gap, c)) != present_.end()) {
            const std::int64_t length = slots_.length(c);
            gap -= length * take(c, std::min({quotient(gap, length), left(c), places_}));
        }
        least_gap_ = gap;
        best_ = row_;
    }

    Slots slots_;
    BitTree present_;  // classes that have samples
    Limits limits_;
    std::vector<std::uint32_t> left_;
    std::size_t last_ = 0;          // no class behind it has samples
    std::vector<Part> row_, best_;  // being tried; with the least gap so far
    std::array<std::uint32_t, kDepth + 2> path_{}, best_path_{};  // what a search adds, one of each
    std::size_t tail_ = 0;                                        // of best_path_
    std::int64_t steps_of_row_, all_steps_ = 0;
    std::int64_t places_ = 0, gap_ = 0, steps_ = 0, least_gap_ = 0;
};

}  // namespace hermes
