#include "window.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <numeric>

#include "exact_gap.hpp"

namespace hermes {
namespace {

constexpr std::int64_t kOldest = 2;    // windows that a sample waits at most
constexpr std::int64_t kReserve = 96;  // samples carried for the sake of choice
constexpr std::int64_t kStepsOfRow = 2048;
constexpr std::int64_t kMisses = 16;  // longest samples in a window that may fail to fill a row

struct Waiting {
    std::int64_t place;  // in the input
    std::int64_t length;
    std::int64_t age;
};

class Pool {
public:
    Pool(const Limits& limits, const Seed& seed, Windowed& out)
        : limits_(limits), seed_(seed), out_(out) {}

    void add(const Waiting& sample) {
        samples_.push_back(sample);
    }

    std::int64_t size() const {
        return static_cast<std::int64_t>(samples_.size());
    }

    const std::vector<Waiting>& samples() const {
        return samples_;
    }

    // Makes rows of what waits; with `all`, of every sample.
    void pack(std::uint64_t window, bool all) {
        if (samples_.empty()) {
            return;
        }
        sort_by_class();
        Search search(classes_, limits_, kStepsOfRow, kStepsOfRow * size());
        row_ends_.clear();
        taken_.clear();
        if (!all) {
            old_rows(search);
        }
        std::int64_t misses = 0;
        for (std::size_t c = 0; (c = search.longest()) != classes_.size();) {
            const std::int64_t left = size() - static_cast<std::int64_t>(taken_.size());
            if (!all && (left <= kReserve || misses > kMisses)) {
                break;
            }
            const std::vector<Part>& parts = search.make_row();
            if (search.gap() == 0 || all) {
                take(search, parts);
            } else {
                search.set_aside(c);
                ++misses;
            }
        }
        emit(window);
        carry();
    }

private:
    // By falling length, digit after digit, and in a class by place: who was carried comes first.
    void sort_by_class() {
        constexpr int digit_bits = 8;
        constexpr std::size_t largest = (std::size_t{1} << digit_bits) - 1;
        order_.resize(samples_.size());
        other_.resize(samples_.size());
        std::iota(order_.begin(), order_.end(), 0U);
        std::int64_t longest = 0;
        for (const Waiting& sample : samples_) {
            longest = std::max(longest, sample.length);
        }
        for (int shift = 0; longest >> shift != 0; shift += digit_bits) {
            const auto key = [&](std::uint32_t i) {
                return largest - (static_cast<std::size_t>(samples_[i].length >> shift) & largest);
            };
            std::array<std::uint32_t, largest + 2> starts{};
            for (const std::uint32_t i : order_) {
                ++starts[key(i) + 1];
            }
            std::partial_sum(starts.begin(), starts.end(), starts.begin());
            for (const std::uint32_t i : order_) {
                other_[starts[key(i)]++] = i;
            }
            std::swap(order_, other_);
        }
        classes_.clear();
        next_.clear();
        for (std::size_t i = 0; i < order_.size(); ++i) {
            const std::int64_t length = samples_[order_[i]].length;
            if (classes_.empty() || classes_.back().length != length) {
                classes_.push_back({length, 0});
                next_.push_back(i);
            }
            ++classes_.back().count;
        }
        is_used_.assign(samples_.size(), 0);
    }

    // Who has waited long enough has a row now, whether it is full or not; several share one.
    void old_rows(Search& search) {
        std::vector<std::size_t> old;
        std::int64_t tokens = 0;
        const auto make_row = [&] {
            take(search, search.make_row_with(old));
            old.clear();
            tokens = 0;
        };
        std::size_t c = 0;
        for (std::size_t i = 0; i < order_.size(); ++i) {
            const Waiting& sample = samples_[order_[i]];
            c += classes_[c].length != sample.length ? 1 : 0;
            if (is_used_[order_[i]] != 0 || sample.age < kOldest) {
                continue;
            }
            old.push_back(c);
            tokens += sample.length;
            if (2 * (tokens + sample.length) > limits_.tokens ||
                2 * static_cast<std::int64_t>(old.size()) >= limits_.samples) {
                make_row();
            }
        }
        if (!old.empty()) {
            make_row();
        }
    }

    void take(Search& search, const std::vector<Part>& parts) {
        for (std::int64_t rows = search.use(parts); rows > 0; --rows) {
            for (const Part& part : parts) {
                for (std::int64_t i = 0; i < part.samples; ++i) {
                    const std::size_t at = order_[next_[part.of_class]++];
                    is_used_[at] = 1;
                    taken_.push_back(samples_[at].place);
                }
            }
            row_ends_.push_back(static_cast<std::ptrdiff_t>(taken_.size()));
        }
    }

    // The rows made, in an order of chance: long samples are looked at first, and shall not come
    // so.
    void emit(std::uint64_t window) {
        Xoshiro256 random(seed_for(seed_, window));
        std::vector<std::uint32_t> rows(row_ends_.size());
        std::iota(rows.begin(), rows.end(), 0U);
        shuffle(rows.data(), rows.size(), random);
        for (const std::uint32_t row : rows) {
            const auto start = taken_.begin() + (row == 0 ? 0 : row_ends_[row - 1]);
            out_.samples.insert(out_.samples.end(), start, taken_.begin() + row_ends_[row]);
            out_.row_offsets.push_back(static_cast<std::int64_t>(out_.samples.size()));
        }
    }

    void carry() {
        std::size_t kept = 0;
        for (std::size_t i = 0; i < samples_.size(); ++i) {
            if (!is_used_[i]) {
                samples_[kept] = samples_[i];
                ++samples_[kept++].age;
            }
        }
        samples_.resize(kept);
    }

    Limits limits_;
    Seed seed_;
    Windowed& out_;
    std::vector<Waiting> samples_;      // by place
    std::vector<std::uint32_t> order_;  // numbers of samples, by class
    std::vector<std::uint32_t> other_;  // while they are sorted
    std::vector<LengthClass> classes_;
    std::vector<std::size_t> next_;  // of each class, its next sample in order_
    std::vector<char> is_used_;
    std::vector<std::int64_t> taken_;       // places, row after row
    std::vector<std::ptrdiff_t> row_ends_;  // in taken_
};

}  // namespace

Windowed pack_windows(const std::int64_t* lengths, std::int64_t count,
                      const std::vector<std::int64_t>& ages, std::int64_t window,
                      const Limits& limits, const Seed& seed, std::uint64_t first_window,
                      bool finish) {
    Windowed out;
    out.row_offsets.push_back(0);
    Pool pool(limits, seed, out);
    const auto before = static_cast<std::int64_t>(ages.size());
    for (std::int64_t i = 0; i < before; ++i) {
        pool.add({i, lengths[i], ages[static_cast<std::size_t>(i)]});
    }
    std::int64_t next = before;
    while (next < count) {
        const std::int64_t end = std::min(next + window, count);
        for (; next < end; ++next) {
            pool.add({next, lengths[next], 0});
        }
        pool.pack(first_window++, finish && next == count);
    }
    if (finish && before == count) {
        pool.pack(first_window, true);
    }
    for (const Waiting& sample : pool.samples()) {
        out.carried.push_back(sample.place);
        out.ages.push_back(sample.age);
    }
    return out;
}

}  // namespace hermes
