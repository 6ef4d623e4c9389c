#include "packing.hpp"

#include <algorithm>
#include <utility>

#include "bit_tree.hpp"
#include "buffer.hpp"

namespace hermes {
namespace {

struct Run {  // rows first, first + 1, ... each with this room
    std::uint32_t first;
    std::uint32_t rows;
    std::uint32_t room;
    std::uint32_t places;  // samples that each may still take
};

// Rows too full for the class at hand sleep until the first class that fits: lengths only fall.
class Sleepers {
public:
    Sleepers(const std::vector<LengthClass>& classes, std::int64_t row_length)
        : fitting_(classes, row_length), shortest_(classes.back().length) {
        reserve_in_huge_pages(heads_, classes.size());
        heads_.resize(classes.size(), kNone);
        reserve_in_huge_pages(runs_, classes.size());
    }

    void add(const Run& run) {
        if (run.room < shortest_ || run.places == 0) {
            return;
        }
        const std::uint32_t wakes_at = fitting_(run.room);
        runs_.push_back({run, heads_[wakes_at]});
        heads_[wakes_at] = static_cast<std::uint32_t>(runs_.size()) - 1;
    }

    void wake(std::size_t class_index, std::vector<Run>& out) const {
        constexpr std::size_t ahead = 32;  // those of many classes lie in no cache
        if (class_index + ahead < heads_.size()) {
            const std::uint32_t next = heads_[class_index + ahead];
            __builtin_prefetch(runs_.data() + (next == kNone ? 0 : next));
        }
        out.clear();
        for (std::uint32_t at = heads_[class_index]; at != kNone; at = runs_[at].next) {
            out.push_back(runs_[at].run);
        }
    }

private:
    static constexpr std::uint32_t kNone = ~std::uint32_t{0};
    struct Link {
        Run run;
        std::uint32_t next;
    };

    FirstFitting fitting_;
    std::vector<std::uint32_t> heads_;
    std::vector<Link> runs_;
    std::int64_t shortest_;
};

// Runs that fit the class at hand; take() gives the one with the least room, then the lowest.
// Lengths fall, so whatever wakes has less room than all that woke before, and what was put back
// less than any: a stack of heaps, as of many that wake together few may be taken.
class LeastRoomFirst {
public:
    explicit LeastRoomFirst(std::int64_t) {}
    bool empty() const {
        return runs_.empty();
    }
    void wake(const std::vector<Run>& runs) {
        if (!runs.empty()) {
            heaps_.push_back(runs_.size());
            runs_.insert(runs_.end(), runs.begin(), runs.end());
            std::make_heap(last_heap(), runs_.end(), comes_later);
        }
    }
    void put_back(const Run& run) {
        heaps_.push_back(runs_.size());
        runs_.push_back(run);
    }
    Run take() {
        std::pop_heap(last_heap(), runs_.end(), comes_later);
        const Run run = runs_.back();
        runs_.pop_back();
        if (runs_.size() == heaps_.back()) {
            heaps_.pop_back();
        }
        return run;
    }

private:
    std::vector<Run>::iterator last_heap() {
        return runs_.begin() + static_cast<std::ptrdiff_t>(heaps_.back());
    }
    static bool comes_later(const Run& a, const Run& b) {
        return a.room != b.room ? a.room > b.room : a.first > b.first;
    }

    std::vector<Run> runs_;
    std::vector<std::size_t> heaps_;  // where each begins
};

// Runs that fit the class at hand; take() gives the lowest-numbered, found in a tree of bits.
class LowestFirst {
public:
    explicit LowestFirst(std::int64_t max_rows)
        : slots_(static_cast<std::size_t>(max_rows)), waiting_(slots_.size()) {}
    bool empty() const {
        return waiting_.empty();
    }
    void wake(const std::vector<Run>& runs) {
        for (const Run& run : runs) {
            put_back(run);
        }
    }
    void put_back(const Run& run) {
        if (free_.empty()) {
            free_.push_back(static_cast<std::uint32_t>(runs_.size()));
            runs_.emplace_back();
        }
        slots_[run.first] = free_.back();
        runs_[free_.back()] = run;
        free_.pop_back();
        waiting_.add(run.first);
    }
    Run take() {
        const std::size_t at = waiting_.first();
        waiting_.remove(at);
        free_.push_back(slots_[at]);
        return runs_[slots_[at]];
    }

private:
    std::vector<Run> runs_;
    std::vector<std::uint32_t> free_;  // places in runs_
    Buffer<std::uint32_t> slots_;      // by first row, its place in runs_ where it waits
    BitTree waiting_;                  // first rows
};

template <class Active>
Plan place(const std::vector<LengthClass>& classes, const Limits& limits, std::int64_t max_rows) {
    Plan plan;
    reserve_in_huge_pages(plan.placements, classes.size());
    Sleepers sleepers(classes, limits.tokens);
    Active active(max_rows);
    std::vector<Run> woken;
    // Numbers of 32 bits: those of 64 take a processor several times as long to divide.
    const auto row_length = static_cast<std::uint32_t>(limits.tokens);
    const auto most = static_cast<std::uint32_t>(limits.samples);
    for (std::size_t i = 0; i < classes.size(); ++i) {
        const auto length = static_cast<std::uint32_t>(classes[i].length);
        auto left = static_cast<std::uint32_t>(classes[i].count);
        sleepers.wake(i, woken);
        active.wake(woken);
        while (left > 0) {
            Run run;
            if (active.empty()) {
                const std::uint32_t each = std::min(row_length / length, most);
                const std::uint32_t rows = (left + each - 1) / each;
                run = {static_cast<std::uint32_t>(plan.rows), rows, row_length, most};
                plan.rows += rows;
            } else {
                run = active.take();
            }
            const std::uint32_t each = std::min(run.room / length, run.places);
            const std::uint32_t full = std::min(run.rows, left / each);
            if (full > 0) {
                plan.placements.push_back({run.first, full, each});
                sleepers.add({run.first, full, run.room - each * length, run.places - each});
                left -= full * each;
                run.first += full;
                run.rows -= full;
            }
            if (run.rows > 0 && left > 0) {  // one more row takes what is left, and keeps room
                if (run.rows > 1) {
                    active.put_back({run.first + 1, run.rows - 1, run.room, run.places});
                }
                plan.placements.push_back({run.first, 1, left});
                run.rows = 1;
                run.room -= left * length;
                run.places -= left;
                left = 0;
            }
            if (run.rows > 0) {
                active.put_back(run);
            }
        }
    }
    return plan;
}

}  // namespace

FirstFitting::FirstFitting(const std::vector<LengthClass>& classes, std::int64_t row_length)
    : classes_(classes.data()), end_(static_cast<std::uint32_t>(classes.size())) {
    // One entry for each length where that is affordable: few classes do not pay for a large table.
    const auto wanted = std::clamp<std::int64_t>(32 * std::int64_t{end_}, 1 << 10, 1 << 18);
    while (row_length >> shift_ > wanted) {
        ++shift_;
    }
    starts_.resize(static_cast<std::size_t>(row_length >> shift_) + 1);
    auto end = starts_.end();
    for (std::uint32_t c = 0; c < end_; ++c) {
        const auto begin = starts_.begin() + (classes[c].length >> shift_);
        if (begin < end) {
            std::fill(begin, end, c);
            end = begin;
        }
    }
    std::fill(starts_.begin(), end, end_);
}

Plan make_plan(const std::vector<LengthClass>& classes, const Limits& limits, Strategy strategy) {
    if (classes.empty()) {
        return {};
    }
    if (strategy == Strategy::exact_gap) {
        return plan_by_exact_gap(classes, limits);
    }
    std::int64_t tokens = 0, count = 0;
    for (const LengthClass& c : classes) {
        tokens += c.length * c.count;
        count += c.count;
    }
    // Of the rows that still may take a sample, both leave at most one half empty or emptier.
    const std::int64_t max_rows =
        std::min(count, 2 * (tokens / limits.tokens) + count / limits.samples + 2);
    return strategy == Strategy::first_fit ? place<LowestFirst>(classes, limits, max_rows)
                                           : place<LeastRoomFirst>(classes, limits, max_rows);
}

std::int64_t lower_bound(const std::vector<LengthClass>& classes, const Limits& limits) {
    const std::int64_t row_length = limits.tokens;
    // For each a <= C / 2: samples above C - a fill a row alone, those above C / 2 have a row each,
    // and what of those in [a, C / 2] does not fit beside the latter needs rows of its own.
    std::int64_t count = 0;
    for (const LengthClass& c : classes) {
        count += c.count;
    }
    const std::int64_t by_samples = (count + limits.samples - 1) / limits.samples;
    std::int64_t large = 0, small_tokens = 0, room_beside = 0;
    std::size_t first_small = 0;
    for (; first_small < classes.size() && 2 * classes[first_small].length > row_length;
         ++first_small) {
        const LengthClass& c = classes[first_small];
        large += c.count;
        room_beside += c.count * (row_length - c.length);
    }
    for (std::size_t i = first_small; i < classes.size(); ++i) {
        small_tokens += classes[i].length * classes[i].count;
    }
    std::int64_t most_extra = 0;
    std::size_t alone = 0;
    for (std::size_t i = classes.size(); i-- > first_small;) {
        for (; alone < first_small && classes[alone].length > row_length - classes[i].length;
             ++alone) {
            room_beside -= classes[alone].count * (row_length - classes[alone].length);
        }
        most_extra = std::max(most_extra, small_tokens - room_beside);
        small_tokens -= classes[i].length * classes[i].count;
    }
    return std::max(large + (most_extra + row_length - 1) / row_length, by_samples);
}

}  // namespace hermes
