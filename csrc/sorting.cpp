#include "sorting.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "buffer.hpp"

namespace hermes {
namespace {

// Up to so many lengths, each is counted, and two passes over parts that fit in a cache sort by
// those counts. Where there are fewer samples than lengths, counting costs more.
constexpr std::int64_t kCountedLengths = (std::int64_t{1} << 17) + 1;

template <class F>
auto with_type(const Lengths& lengths, F f) {
    switch (lengths.dtype) {
        case Dtype::int8: return f(static_cast<const std::int8_t*>(lengths.data));
        case Dtype::int16: return f(static_cast<const std::int16_t*>(lengths.data));
        case Dtype::int32: return f(static_cast<const std::int32_t*>(lengths.data));
        case Dtype::int64: return f(static_cast<const std::int64_t*>(lengths.data));
        case Dtype::uint8: return f(static_cast<const std::uint8_t*>(lengths.data));
        case Dtype::uint16: return f(static_cast<const std::uint16_t*>(lengths.data));
        case Dtype::uint32: return f(static_cast<const std::uint32_t*>(lengths.data));
        default: return f(static_cast<const std::uint64_t*>(lengths.data));
    }
}

int bit_width(std::uint64_t value) {
    return value == 0 ? 0 : 64 - __builtin_clzll(value);
}

// Key 0 is the longest length; where `top` is row_length + 1, key 0 stands for "too long".
template <class T>
struct Keys {
    const T* lengths;
    std::int64_t top;
    std::uint32_t operator()(std::size_t i) const {
        // Lengths are at least 1, and unsigned ones of 64 bits may be beyond int64.
        const auto length = static_cast<std::uint64_t>(lengths[i]);
        const auto most = static_cast<std::uint64_t>(top);
        return static_cast<std::uint32_t>(most - std::min(length, most));
    }
};

// The same where no length is above `top`.
template <class T>
struct FittingKeys {
    const T* lengths;
    std::int64_t top;
    std::uint32_t operator()(std::size_t i) const {
        return static_cast<std::uint32_t>(top) - static_cast<std::uint32_t>(lengths[i]);
    }
};

// `bits` and those of (length - 1).
template <class T, class U = std::make_unsigned_t<T>>
U with_bits_of(T length, U bits) {
    return static_cast<U>(bits | static_cast<U>(static_cast<U>(length) - U{1}));
}

template <class T>
std::make_unsigned_t<T> bits_of(const T* values, std::int64_t count) {
    using U = std::make_unsigned_t<T>;
    U bits = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        bits = with_bits_of(values[i], bits);
    }
    return bits;
}

// Counts every key, and gathers the bits of (length - 1): a length below 1 makes them no less than
// the largest of a signed type.
//
// A group whose bits show that all its lengths have a counter in `few` is counted there, by length.
// In words of 16 bits, emptied before one can overflow, 16,384 of them stay in the innermost cache.
template <class T>
std::make_unsigned_t<T> count_keys(const Keys<T>& keys, std::size_t count,
                                   std::vector<std::uint32_t>& counts) {
    using U = std::make_unsigned_t<T>;
    constexpr std::size_t group = 8, ahead = 8192 / sizeof(T);  // farther than the hardware looks
    constexpr std::size_t most = std::numeric_limits<std::uint16_t>::max() / group * group;
    const std::size_t longest = std::size_t{1}
                                << bit_width(std::max<std::int64_t>(keys.top, 2) - 2);
    std::vector<std::uint16_t> few(longest + 1);
    std::vector<std::uint32_t> by_length(longest + 1);
    U bits = 0;
    std::size_t i = 0;
    for (const std::size_t grouped = count / group * group; i < grouped;) {
        for (const std::size_t end = std::min(grouped, i + most); i < end; i += group) {
            __builtin_prefetch(keys.lengths + i + ahead);
            const U of_group = bits_of(keys.lengths + i, group);
            bits |= of_group;
            for (std::size_t k = i; k < i + group; ++k) {
                if (of_group < longest) {
                    ++few[std::min<std::size_t>(static_cast<U>(keys.lengths[k]), longest)];
                } else {
                    ++counts[keys(k)];
                }
            }
        }
        for (std::size_t length = 0; length <= longest; ++length) {
            by_length[length] += few[length];
            few[length] = 0;
        }
    }
    for (; i < count; ++i) {
        bits = with_bits_of(keys.lengths[i], bits);
        ++counts[keys(i)];
    }
    for (std::size_t length = 0; length <= longest; ++length) {
        counts[keys.top - std::min<std::int64_t>(length, keys.top)] += by_length[length];
    }
    return bits;
}

// Ahead of a write that is one of hundreds of streams, too many for the hardware to foresee.
inline void expect_write(const std::uint32_t* place) {
    constexpr int line = 64 / sizeof(std::uint32_t);
    __builtin_prefetch(place + line, 1);
}

[[noreturn]] void refuse_changed() {
    throw std::invalid_argument("lengths changed while they were read; pass a copy of them");
}

// By the upper bits of the key, then each of those parts, which fits in a cache, by the lower ones.
// Between the two, an element is one word: lower bits of the key, then its id. Loops unrolled by
// the compiler take a third less time.
//
// Lengths that another thread changes no longer have the counts that the scan found: no place is
// past the end all the same, and the counts are compared once the places are given out.
template <class K>
void sort_in_two_passes(const K& keys, std::size_t count, const std::vector<std::uint32_t>& begins,
                        std::uint32_t* ids, std::uint32_t* spare) {
    constexpr std::size_t ahead = 1 << 16;  // about a part, in which ids are written anywhere
    const std::size_t key_count = begins.size() - 1;
    const int key_bits = std::max(1, bit_width(key_count - 1));
    const int id_bits = std::max(1, bit_width(count - 1));
    const int low_bits = std::min(32 - id_bits, (key_bits + 1) / 2);
    const int id_shift = 32 - low_bits;
    const std::uint32_t id_mask = (1U << id_shift) - 1;
    const auto last = static_cast<std::uint32_t>(count - 1);
    const auto last_key = static_cast<std::uint32_t>(key_count - 1);
    std::vector<std::uint32_t> parts;  // where each begins
    for (std::size_t key = 0; key < key_count; key += std::size_t{1} << low_bits) {
        parts.push_back(begins[key]);
    }
    std::vector<std::uint32_t> ends_of_parts = parts, ends_of_keys = begins;
    std::uint32_t* ends = ends_of_parts.data();
#pragma GCC unroll 8
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t key = std::min(keys(i), last_key);
        const std::uint32_t place = std::min(ends[key >> low_bits]++, last);
        spare[place] = key << id_shift | static_cast<std::uint32_t>(i);
        expect_write(spare + place);
    }
    parts.push_back(static_cast<std::uint32_t>(count));
    if (!std::equal(ends_of_parts.begin(), ends_of_parts.end(), parts.begin() + 1)) {
        refuse_changed();
    }
    for (std::size_t part = 0; part + 1 < parts.size(); ++part) {
        ends = ends_of_keys.data() + (part << low_bits);
        const std::uint32_t end = parts[part + 1];
#pragma GCC unroll 8
        for (std::uint32_t i = parts[part]; i < end; ++i) {
            const std::uint32_t word = spare[i];
            ids[std::min(ends[word >> id_shift]++, last)] = word & id_mask;
            __builtin_prefetch(ids + i + ahead, 1);
        }
    }
    if (!std::equal(begins.begin() + 1, begins.end(), ends_of_keys.begin())) {
        refuse_changed();
    }
}

template <class T>
void sort_in_digits(const Keys<T>& keys, std::size_t count, std::uint32_t* ids,
                    std::vector<LengthClass>& classes) {
    constexpr int digit_bits = 11;
    constexpr std::uint64_t mask = (1U << digit_bits) - 1;
    Buffer<std::uint64_t> pairs(count), other(count);  // key, then id
    for (std::size_t id = 0; id < count; ++id) {
        pairs[id] = std::uint64_t{keys(id)} << 32 | id;
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
    for (std::size_t i = 0; i < count; ++i) {
        ids[i] = static_cast<std::uint32_t>(pairs[i]);
        const std::int64_t length = keys.top - static_cast<std::int64_t>(pairs[i] >> 32);
        if (classes.empty() || classes.back().length != length) {
            classes.push_back({length, 0});
        }
        ++classes.back().count;
    }
}

// The first index whose value is outside [1, top], or -1.
template <class T>
std::int64_t find_outside(const T* values, std::int64_t count, std::uint64_t top) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (values[i] < T{1} || static_cast<std::uint64_t>(values[i]) > top) {
            return i;
        }
    }
    return -1;
}

}  // namespace

Scan scan(const Lengths& lengths, std::int64_t row_length, bool truncate) {
    return with_type(lengths, [&](const auto* values) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
        constexpr auto largest = static_cast<std::uint64_t>(std::numeric_limits<T>::max());
        const auto count = static_cast<std::size_t>(lengths.count);
        const auto most = static_cast<std::uint64_t>(row_length);
        const bool is_counted = row_length < kCountedLengths;
        Scan found;
        std::uint64_t bits = 0;
        found.top = row_length + !truncate;
        if (!is_counted) {
            bits = bits_of(values, lengths.count);
            found.top = std::min(found.top, static_cast<std::int64_t>(std::min(bits, most)) + 1);
        }
        if (found.top <= std::min(kCountedLengths, lengths.count)) {
            std::vector<std::uint32_t> counts(static_cast<std::size_t>(found.top) + 1);
            bits = count_keys(Keys<T>{values, found.top}, count, counts);
            std::uint32_t begin = 0;
            for (std::uint32_t& n : counts) {
                begin += std::exchange(n, begin);
            }
            found.begins = std::move(counts);
        } else if (is_counted) {
            bits = bits_of(values, lengths.count);
        }
        if (bits >= largest) {
            found.too_small = find_outside(values, lengths.count, ~std::uint64_t{0});
        }
        if (bits >= most && found.too_small < 0) {  // every length is at most bits + 1
            found.too_long = find_outside(values, lengths.count, most);
        }
        return found;
    });
}

std::string length_text(const Lengths& lengths, std::int64_t index) {
    return with_type(lengths,
                     [index](const auto* values) { return std::to_string(values[index]); });
}

Sorted sort_by_length(const Lengths& lengths, const Scan& scanned, std::int64_t row_length,
                      std::uint32_t* ids, std::uint32_t* spare) {
    Sorted sorted;
    if (lengths.count == 0) {
        return sorted;
    }
    with_type(lengths, [&](const auto* values) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
        const Keys<T> keys{values, scanned.top};
        const auto count = static_cast<std::size_t>(lengths.count);
        if (scanned.begins.empty()) {
            sort_in_digits(keys, count, ids, sorted.classes);
            return;
        }
        if (scanned.too_long < 0) {
            const FittingKeys<T> fitting{values, scanned.top};
            sort_in_two_passes(fitting, count, scanned.begins, ids, spare);
        } else {
            sort_in_two_passes(keys, count, scanned.begins, ids, spare);
        }
        for (std::int64_t key = 0; key < scanned.top; ++key) {
            const std::uint32_t* begin = scanned.begins.data() + key;
            if (begin[1] != begin[0]) {
                sorted.classes.push_back({scanned.top - key, begin[1] - begin[0]});
            }
        }
    });
    if (sorted.classes.back().length < 1 ||
        (scanned.too_long < 0 && sorted.classes.front().length > row_length)) {
        refuse_changed();
    }
    if (sorted.classes.front().length > row_length) {
        sorted.dropped = sorted.classes.front().count;
        sorted.classes.erase(sorted.classes.begin());
    }
    return sorted;
}

}  // namespace hermes
