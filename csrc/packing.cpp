#include "packing.hpp"

#include <algorithm>
#include <numeric>

namespace hermes {
namespace {

// One counting sort reaches this many keys; beyond, its counters leave the cache.
constexpr std::int64_t kOnePassKeys = std::int64_t{1} << 17;
constexpr std::size_t kPrefetchedRows = 64;

// ---- sorting ----------------------------------------------------------------------------------

struct Keys {  // key 0 is the longest length; with TooLong::drop, key 0 stands for "too long"
    const std::int64_t* lengths;
    std::int64_t top;
    std::uint32_t operator()(std::int64_t i) const {
        return static_cast<std::uint32_t>(top - std::min(lengths[i], top));
    }
};

void sort_in_one_pass(const Keys& keys, std::int64_t count, Buffer<std::uint32_t>& ids,
                      std::vector<LengthClass>& classes) {
    // Four tables, since a run of equal lengths would wait on one counter's last store.
    const auto size = static_cast<std::size_t>(keys.top);
    std::vector<std::uint32_t> tables(4 * size);
    std::int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        ++tables[keys(i)];
        ++tables[size + keys(i + 1)];
        ++tables[2 * size + keys(i + 2)];
        ++tables[3 * size + keys(i + 3)];
    }
    for (; i < count; ++i) {
        ++tables[keys(i)];
    }
    std::uint32_t start = 0;
    for (std::size_t key = 0; key < size; ++key) {
        const std::uint32_t here =
            tables[key] + tables[size + key] + tables[2 * size + key] + tables[3 * size + key];
        if (here != 0) {
            classes.push_back({keys.top - static_cast<std::int64_t>(key), here});
        }
        tables[key] = start;
        start += here;
    }
    for (std::int64_t id = 0; id < count; ++id) {
        ids[tables[keys(id)]++] = static_cast<std::uint32_t>(id);
    }
}

void sort_in_digits(const Keys& keys, std::int64_t count, Buffer<std::uint32_t>& ids,
                    std::vector<LengthClass>& classes) {
    constexpr int digit_bits = 11;
    constexpr std::uint64_t mask = (1U << digit_bits) - 1;
    const auto size = static_cast<std::size_t>(count);
    Buffer<std::uint64_t> pairs(size), other(size);  // key, then id
    for (std::size_t id = 0; id < size; ++id) {
        pairs[id] = std::uint64_t{keys(static_cast<std::int64_t>(id))} << 32 | id;
    }
    for (int shift = 0; keys.top >> shift != 0; shift += digit_bits) {
        std::array<std::uint32_t, mask + 2> starts{};
        for (const std::uint64_t pair : pairs) {
            ++starts[(pair >> (32 + shift) & mask) + 1];
        }
        std::partial_sum(starts.begin(), starts.end(), starts.begin());
        for (const std::uint64_t pair : pairs) {
            other[starts[pair >> (32 + shift) & mask]++] = pair;
        }
        std::swap(pairs, other);
    }
    for (std::size_t i = 0; i < size; ++i) {
        ids[i] = static_cast<std::uint32_t>(pairs[i]);
        const std::int64_t length = keys.top - static_cast<std::int64_t>(pairs[i] >> 32);
        if (classes.empty() || classes.back().length != length) {
            classes.push_back({length, 0});
        }
        ++classes.back().count;
    }
}

// ---- planning ---------------------------------------------------------------------------------

struct Run {  // rows first, first + 1, ... each with this room
    std::uint32_t first;
    std::uint32_t rows;
    std::int64_t room;
};

// Rows too full for the class at hand sleep until the first class that fits: lengths only fall.
class Sleepers {
public:
    Sleepers(const std::vector<LengthClass>& classes, std::int64_t row_length)
        : classes_(classes), heads_(classes.size(), kNone) {
        const auto wanted = std::max<std::int64_t>(std::int64_t{1} << 16,
                                                   2 * static_cast<std::int64_t>(classes.size()));
        while (row_length >> shift_ > wanted) {
            ++shift_;
        }
        // starts_[k]: how many classes are longer than every room r with r >> shift_ == k.
        starts_.resize(static_cast<std::size_t>(row_length >> shift_) + 1);
        std::uint32_t longer = 0;
        for (std::size_t k = starts_.size(); k-- > 0;) {
            while (longer < classes.size() &&
                   static_cast<std::size_t>(classes[longer].length >> shift_) > k) {
                ++longer;
            }
            starts_[k] = longer;
        }
    }

    void add(const Run& run) {
        if (run.room < classes_.back().length) {
            return;
        }
        const std::uint32_t wakes_at = first_fitting(run.room);
        runs_.push_back({run, heads_[wakes_at]});
        heads_[wakes_at] = static_cast<std::uint32_t>(runs_.size()) - 1;
    }

    void wake(std::size_t class_index, std::vector<Run>& out) const {
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

    std::uint32_t first_fitting(std::int64_t room) const {
        const auto k = static_cast<std::size_t>(room >> shift_);
        const auto low = classes_.begin() + starts_[k];
        const auto high = k == 0 ? classes_.end() : classes_.begin() + starts_[k - 1];
        const auto fits = std::partition_point(
            low, high, [room](const LengthClass& c) { return c.length > room; });
        return static_cast<std::uint32_t>(fits - classes_.begin());
    }

    const std::vector<LengthClass>& classes_;
    std::vector<std::uint32_t> heads_, starts_;
    std::vector<Link> runs_;
    int shift_ = 0;
};

// Runs that fit the class at hand; take() gives the one with the least room, then the lowest.
// Lengths fall, so whatever wakes has less room than all that woke before: a stack is in order.
class LeastRoomFirst {
public:
    explicit LeastRoomFirst(std::int64_t) {}
    bool empty() const {
        return stack_.empty();
    }
    void wake(std::vector<Run>& runs) {
        std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) {
            return a.room != b.room ? a.room > b.room : a.first > b.first;
        });
        stack_.insert(stack_.end(), runs.begin(), runs.end());
    }
    void put_back(const Run& run) {
        stack_.push_back(run);
    }
    Run take() {
        const Run run = stack_.back();
        stack_.pop_back();
        return run;
    }

private:
    std::vector<Run> stack_;
};

// Runs that fit the class at hand; take() gives the lowest-numbered, found in a tree of bits.
class LowestFirst {
public:
    explicit LowestFirst(std::int64_t max_rows) : slots_(static_cast<std::size_t>(max_rows)) {
        for (std::int64_t words = max_rows; levels_.empty() || words > 1;) {
            words = (words + 63) / 64;
            levels_.emplace_back(static_cast<std::size_t>(words));
        }
    }
    bool empty() const {
        return levels_.back()[0] == 0;
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
        std::size_t at = run.first;
        for (auto& level : levels_) {
            level[at / 64] |= std::uint64_t{1} << at % 64;
            at /= 64;
        }
    }
    Run take() {
        std::size_t at = 0;
        for (auto level = levels_.rbegin(); level != levels_.rend(); ++level) {
            at = at * 64 + static_cast<std::size_t>(__builtin_ctzll((*level)[at]));
        }
        const Run run = runs_[slots_[at]];
        free_.push_back(slots_[at]);
        for (auto& level : levels_) {
            std::uint64_t& word = level[at / 64];
            word &= ~(std::uint64_t{1} << at % 64);
            if (word != 0) {
                break;
            }
            at /= 64;
        }
        return run;
    }

private:
    std::vector<Run> runs_;
    std::vector<std::uint32_t> free_;  // places in runs_
    Buffer<std::uint32_t> slots_;      // by first row, its place in runs_ where a bit is set
    std::vector<std::vector<std::uint64_t>> levels_;
};

template <class Active>
Plan place(const std::vector<LengthClass>& classes, std::int64_t row_length,
           std::int64_t max_rows) {
    Plan plan;
    Sleepers sleepers(classes, row_length);
    Active active(max_rows);
    std::vector<Run> woken;
    const auto emit = [&plan](std::uint32_t first, std::int64_t rows, std::int64_t each) {
        plan.placements.push_back(
            {first, static_cast<std::uint32_t>(rows), static_cast<std::uint32_t>(each)});
    };
    for (std::size_t i = 0; i < classes.size(); ++i) {
        const std::int64_t length = classes[i].length;
        std::int64_t left = classes[i].count;
        sleepers.wake(i, woken);
        active.wake(woken);
        while (left > 0) {
            Run run;
            if (active.empty()) {
                const std::int64_t each = row_length / length;
                const std::int64_t rows = (left + each - 1) / each;
                run = {static_cast<std::uint32_t>(plan.rows), static_cast<std::uint32_t>(rows),
                       row_length};
                plan.rows += rows;
            } else {
                run = active.take();
            }
            const std::int64_t each = run.room / length;
            const auto full =
                static_cast<std::uint32_t>(std::min<std::int64_t>(run.rows, left / each));
            if (full > 0) {
                emit(run.first, full, each);
                sleepers.add({run.first, full, run.room - each * length});
                left -= full * each;
                run.first += full;
                run.rows -= full;
            }
            if (run.rows > 0 && left > 0) {  // one more row takes what is left, and keeps room
                if (run.rows > 1) {
                    active.put_back({run.first + 1, run.rows - 1, run.room});
                }
                emit(run.first, 1, left);
                run.rows = 1;
                run.room -= left * length;
                left = 0;
            }
            if (run.rows > 0) {
                active.put_back(run);
            }
        }
    }
    return plan;
}

// ---- shuffling --------------------------------------------------------------------------------

class Xoshiro256 {  // xoshiro256** 1.0 by Blackman and Vigna: the same numbers on every platform
public:
    explicit Xoshiro256(const std::array<std::uint64_t, 4>& seed) : s_(seed) {}
    std::uint32_t below(std::uint32_t bound) {  // the bias is below bound / 2^64
        return static_cast<std::uint32_t>(static_cast<unsigned __int128>(next()) * bound >> 64);
    }

private:
    static std::uint64_t rotate(std::uint64_t x, int by) {
        return x << by | x >> (64 - by);
    }
    std::uint64_t next() {
        const std::uint64_t result = rotate(s_[1] * 5, 7) * 9;
        const std::uint64_t t = s_[1] << 17;
        s_[2] ^= s_[0];
        s_[3] ^= s_[1];
        s_[1] ^= s_[2];
        s_[0] ^= s_[3];
        s_[2] ^= t;
        s_[3] = rotate(s_[3], 45);
        return result;
    }
    std::array<std::uint64_t, 4> s_;
};

Buffer<std::uint32_t> shuffled(std::size_t rows, const std::array<std::uint64_t, 4>& seed) {
    Buffer<std::uint32_t> order(rows);
    std::iota(order.begin(), order.end(), 0U);
    Xoshiro256 random(seed);
    for (std::size_t i = rows; i > 1; --i) {
        std::swap(order[i - 1], order[random.below(static_cast<std::uint32_t>(i))]);
    }
    return order;
}

}  // namespace

std::int64_t find_outside(const std::int64_t* lengths, std::int64_t count, std::int64_t top) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (lengths[i] < 1 || lengths[i] > top) {
            return i;
        }
    }
    return -1;
}

Sorted sort_by_length(const std::int64_t* lengths, std::int64_t count, std::int64_t row_length,
                      TooLong too_long) {
    Sorted sorted;
    sorted.ids = Buffer<std::uint32_t>(static_cast<std::size_t>(count));
    const Keys keys{lengths, too_long == TooLong::drop ? row_length + 1 : row_length};
    if (keys.top <= kOnePassKeys) {
        sort_in_one_pass(keys, count, sorted.ids, sorted.classes);
    } else {
        sort_in_digits(keys, count, sorted.ids, sorted.classes);
    }
    if (!sorted.classes.empty() && sorted.classes.front().length > row_length) {
        sorted.dropped = sorted.classes.front().count;
        sorted.classes.erase(sorted.classes.begin());
    }
    return sorted;
}

Plan make_plan(const std::vector<LengthClass>& classes, std::int64_t row_length,
               Strategy strategy) {
    if (classes.empty()) {
        return {};
    }
    std::int64_t tokens = 0, count = 0;
    for (const LengthClass& c : classes) {
        tokens += c.length * c.count;
        count += c.count;
    }
    // Both strategies leave at most one row half empty or emptier.
    const std::int64_t max_rows = std::min(count, 2 * (tokens / row_length) + 2);
    return strategy == Strategy::first_fit ? place<LowestFirst>(classes, row_length, max_rows)
                                           : place<LeastRoomFirst>(classes, row_length, max_rows);
}

std::int64_t lower_bound(const std::vector<LengthClass>& classes, std::int64_t row_length) {
    // For each a <= C / 2: samples above C - a fill a row alone, those above C / 2 have a row each,
    // and what of those in [a, C / 2] does not fit beside the latter needs rows of its own.
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
        const std::int64_t extra = small_tokens - room_beside;
        if (extra > 0) {
            most_extra = std::max(most_extra, (extra + row_length - 1) / row_length);
        }
        small_tokens -= classes[i].length * classes[i].count;
    }
    return large + most_extra;
}

void lay_out(const Sorted& sorted, const Plan& plan, const std::array<std::uint64_t, 4>* seed,
             std::int64_t* samples, std::int64_t* row_offsets) {
    const auto rows = static_cast<std::size_t>(plan.rows);
    std::vector<std::uint32_t> bounds(rows + 2);  // row r is [bounds[r], bounds[r + 1]) at the end
    for (const Placement& p : plan.placements) {
        for (std::uint32_t row = p.first; row < p.first + p.rows; ++row) {
            bounds[row + 2] += p.each;
        }
    }
    std::partial_sum(bounds.begin(), bounds.end(), bounds.begin());
    Buffer<std::uint32_t> packed(sorted.ids.size());
    const std::uint32_t* next = sorted.ids.data() + sorted.dropped;
    for (const Placement& p : plan.placements) {
        for (std::uint32_t row = p.first; row < p.first + p.rows; ++row) {
            std::uint32_t& at = bounds[row + 1];  // where row r is filled to
            for (std::uint32_t i = 0; i < p.each; ++i) {
                packed[at++] = *next++;
            }
        }
    }
    const auto order = seed ? shuffled(rows, *seed) : Buffer<std::uint32_t>();
    std::int64_t written = 0;
    for (std::size_t block = 0; block < rows; block += kPrefetchedRows) {
        // Shuffled rows lie anywhere in `packed`: ask for all of a block before reading the first.
        std::array<std::uint32_t, kPrefetchedRows> from, to;
        const std::size_t size = std::min(kPrefetchedRows, rows - block);
        for (std::size_t i = 0; i < size; ++i) {
            const std::size_t row = seed ? order[block + i] : block + i;
            from[i] = bounds[row];
            to[i] = bounds[row + 1];
            __builtin_prefetch(&packed[from[i]]);
        }
        for (std::size_t i = 0; i < size; ++i) {
            row_offsets[block + i] = written;
            for (std::uint32_t at = from[i]; at < to[i]; ++at) {
                samples[written++] = packed[at];
            }
        }
    }
    row_offsets[rows] = written;
}

}  // namespace hermes
