#include "window.hpp"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <optional>
#include <utility>

#include "exact_gap.hpp"

namespace hermes {
namespace {

constexpr std::int64_t kOldest = 2;    // windows that a sample waits at most
constexpr std::int64_t kReserve = 96;  // samples carried for the sake of choice
constexpr std::int64_t kStepsOfRow = 2048;
constexpr std::int64_t kMisses = 16;  // longest samples in a window that may fail to fill a row

constexpr std::int64_t kSlotsOfSample = 64, kMostSlots = 1 << 18;  // one for each length

struct Waiting {
    std::uint32_t number;
    std::uint32_t length;
    std::uint32_t age;  // windows that it has waited, or kUsed
};

constexpr std::uint32_t kUsed = ~std::uint32_t{0};

// The classes of some samples.
std::vector<LengthClass> classes_of(const std::vector<Waiting>& samples) {
    std::vector<std::uint32_t> lengths(samples.size());
    std::transform(samples.begin(), samples.end(), lengths.begin(),
                   [](const Waiting& sample) { return sample.length; });
    std::sort(lengths.begin(), lengths.end(), std::greater<>());
    std::vector<LengthClass> classes;
    for (const std::uint32_t length : lengths) {
        if (classes.empty() || classes.back().length != length) {
            classes.push_back({length, 0});
        }
        ++classes.back().count;
    }
    return classes;
}

// Makes rows of samples, which stand by slot: in each, who was carried comes first.
template <class Slots>
class Rows {
public:
    Rows(const Slots& slots, const Limits& limits)
        : slots_(slots),
          search_(slots, limits, kStepsOfRow),
          heads_(slots.size(), kNone),
          limits_(limits) {}

    // Makes rows of samples; with `all`, of every one.
    void make(std::vector<Waiting>& samples, bool all) {
        taken_.clear();
        row_ends_.clear();
        const auto size = static_cast<std::int64_t>(samples.size());
        next_.resize(samples.size());
        for (std::size_t i = samples.size(); i-- > 0;) {
            const std::size_t c = slots_.find(samples[i].length);
            next_[i] = heads_[c];
            heads_[c] = static_cast<std::uint32_t>(i);
            search_.add(c, 1);
        }
        search_.allow(kStepsOfRow * size);
        if (!all) {
            old_rows(samples);
        }
        std::int64_t misses = 0;
        for (std::size_t c = 0; (c = search_.longest()) != slots_.size();) {
            const std::int64_t left = size - static_cast<std::int64_t>(taken_.size());
            if (!all && (left <= kReserve || misses > kMisses)) {
                break;
            }
            const std::vector<Part>& parts = search_.make_row();
            if (search_.gap() == 0 || all) {
                take(parts, samples);
            } else {
                search_.set_aside(c);
                ++misses;
            }
        }
    }

    // Numbers of the samples in rows, row after row, and where each row ends in them.
    const std::vector<std::uint32_t>& taken() const {
        return taken_;
    }
    const std::vector<std::uint32_t>& row_ends() const {
        return row_ends_;
    }

    // Forgets a sample that is in no row, and its like.
    void forget(const Waiting& sample) {
        const std::size_t c = slots_.find(sample.length);
        heads_[c] = kNone;
        search_.clear(c);
    }

private:
    static constexpr std::uint32_t kNone = ~std::uint32_t{0};

    // Who has waited long enough has a row now, whether it is full or not; several share one.
    void old_rows(std::vector<Waiting>& samples) {
        std::vector<std::uint32_t> old;
        for (std::uint32_t i = 0; i < samples.size(); ++i) {
            if (samples[i].age >= kOldest) {
                old.push_back(i);
            }
        }
        std::sort(old.begin(), old.end(), [&](std::uint32_t a, std::uint32_t b) {
            return samples[a].length != samples[b].length ? samples[a].length > samples[b].length
                                                          : a < b;
        });
        std::vector<std::size_t> together;
        std::int64_t tokens = 0;
        const auto make_row = [&] {
            take(search_.make_row_with(together), samples);
            together.clear();
            tokens = 0;
        };
        for (const std::uint32_t i : old) {
            const std::int64_t length = samples[i].length;
            if (samples[i].age == kUsed) {
                continue;
            }
            together.push_back(slots_.find(length));
            tokens += length;
            if (2 * (tokens + length) > limits_.tokens ||
                2 * static_cast<std::int64_t>(together.size()) >= limits_.samples) {
                make_row();
            }
        }
        if (!together.empty()) {
            make_row();
        }
    }

    void take(const std::vector<Part>& parts, std::vector<Waiting>& samples) {
        for (std::int64_t rows = search_.use(parts); rows > 0; --rows) {
            for (const Part& part : parts) {
                std::uint32_t& head = heads_[part.of_class];
                for (std::int64_t i = 0; i < part.samples; ++i) {
                    samples[head].age = kUsed;
                    taken_.push_back(samples[head].number);
                    head = next_[head];
                }
            }
            row_ends_.push_back(static_cast<std::uint32_t>(taken_.size()));
        }
    }

    Slots slots_;
    Search<Slots> search_;
    std::vector<std::uint32_t> heads_;  // of each slot, its next sample
    Limits limits_;
    std::vector<std::uint32_t> next_;  // of each sample, the next of its length
    std::vector<std::uint32_t> taken_, row_ends_;
};

class Pool {
public:
    Pool(const Windows& windows, std::int64_t longest, bool by_length, std::int64_t* samples)
        : windows_(windows), next_(samples) {
        out_.row_offsets.push_back(0);
        if (by_length) {
            rows_.emplace(LengthSlots(longest), windows.limits);
        }
    }

    void add(const Waiting& sample) {
        samples_.push_back(sample);
    }

    // Makes rows of what waits; with `all`, of every sample.
    void pack(std::uint64_t window, bool all) {
        if (rows_) {
            pack(*rows_, window, all);
        } else if (!samples_.empty()) {
            const std::vector<LengthClass> classes = classes_of(samples_);
            Rows rows(ClassSlots(classes, windows_.limits.tokens), windows_.limits);
            pack(rows, window, all);
        }
    }

    Windowed result() {
        for (const Waiting& sample : samples_) {
            out_.carried.push_back(sample.number);
            out_.ages.push_back(sample.age);
        }
        return std::move(out_);
    }

private:
    template <class Slots>
    void pack(Rows<Slots>& rows, std::uint64_t window, bool all) {
        rows.make(samples_, all);
        emit(rows.taken(), rows.row_ends(), window);
        std::size_t kept = 0;
        for (const Waiting& sample : samples_) {
            if (sample.age != kUsed) {
                rows.forget(sample);
                samples_[kept] = sample;
                ++samples_[kept++].age;
            }
        }
        samples_.resize(kept);
    }

    // The rows made, in an order of chance: long samples are looked at first, and shall not come
    // so.
    void emit(const std::vector<std::uint32_t>& taken, const std::vector<std::uint32_t>& row_ends,
              std::uint64_t window) {
        Xoshiro256 random(seed_for(windows_.seed, window));
        order_.resize(row_ends.size());
        std::iota(order_.begin(), order_.end(), 0U);
        shuffle(order_.data(), order_.size(), random);
        for (const std::uint32_t row : order_) {
            const std::uint32_t begin = row == 0 ? 0 : row_ends[row - 1];
            next_ = std::copy(taken.begin() + begin, taken.begin() + row_ends[row], next_);
            out_.samples += row_ends[row] - begin;
            out_.row_offsets.push_back(out_.samples);
        }
    }

    Windows windows_;
    std::int64_t* next_;  // where the next row goes
    Windowed out_;
    std::optional<Rows<LengthSlots>> rows_;  // where there is a slot for each length
    std::vector<Waiting> samples_;           // as they came
    std::vector<std::uint32_t> order_;       // of a window's rows
};

}  // namespace

Windowed pack_windows(const Lengths& lengths, const std::uint32_t* order, std::int64_t count,
                      const std::vector<std::int64_t>& ages, const Windows& windows,
                      std::int64_t* samples) {
    const auto before = static_cast<std::int64_t>(ages.size());
    const std::int64_t longest = longest_of(lengths, windows.limits.tokens);
    const bool by_length = longest <= std::min(kSlotsOfSample * count, kMostSlots);
    Pool pool(windows, longest, by_length, samples);
    auto number = static_cast<std::uint64_t>(windows.first);
    std::vector<std::uint32_t> some;
    std::int64_t next = 0;
    const auto add = [&](std::int64_t end, const auto& age_of) {
        some.resize(static_cast<std::size_t>(end - next));
        read_lengths(lengths, order, next, end, longest, some.data());
        for (const std::uint32_t length : some) {
            const auto at = static_cast<std::uint32_t>(next);
            pool.add({order == nullptr ? at : order[next], length, age_of(next)});
            ++next;
        }
    };
    add(before, [&](std::int64_t i) {
        return static_cast<std::uint32_t>(std::min(ages[static_cast<std::size_t>(i)], kOldest));
    });
    while (next < count) {
        add(std::min(next + windows.window, count), [](std::int64_t) { return 0U; });
        pool.pack(number++, windows.finish && next == count);
    }
    if (windows.finish && before == count) {
        pool.pack(number, true);
    }
    return pool.result();
}

}  // namespace hermes
