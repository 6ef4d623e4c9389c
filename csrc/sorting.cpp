#include "sorting.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <type_traits>

#include "buffer.hpp"

namespace hermes {
namespace {

// Up to so many keys, two counting sorts of half the bits each keep all their ends in the caches.
constexpr std::int64_t kTwoPassKeys = std::int64_t{1} << 17;

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

void add_class(std::vector<LengthClass>& classes, std::int64_t length, std::uint32_t count) {
    if (count != 0) {
        classes.push_back({length, count});
    }
}

// Counts and then moves `count` elements, two at a time from two halves: elements of one key that
// follow one another would wait for the counter's last store. `key(i)` is below `keys`, and
// `put(place, i)` writes element i. Returns where each key begins, and the end.
template <class Key, class Put>
void counting_sort(std::size_t count, std::size_t keys, std::uint32_t start, Key key, Put put,
                   std::vector<std::uint32_t>& ends, std::uint32_t* begins) {
    const std::size_t half = count / 2;
    ends.assign(2 * keys, 0);
    std::uint32_t* first = ends.data();
    std::uint32_t* second = first + keys;
    for (std::size_t i = 0; i < half; ++i) {
        ++first[key(i)];
        ++second[key(half + i)];
    }
    if (count % 2 != 0) {
        ++second[key(count - 1)];
    }
    for (std::size_t k = 0; k < keys; ++k) {
        begins[k] = start;
        const std::uint32_t in_first = first[k], in_second = second[k];
        first[k] = start;
        second[k] = start + in_first;
        start += in_first + in_second;
    }
    begins[keys] = start;
    for (std::size_t i = 0; i < half; ++i) {
        put(first[key(i)]++, i);
        put(second[key(half + i)]++, half + i);
    }
    if (count % 2 != 0) {
        put(second[key(count - 1)]++, count - 1);
    }
}

// By the upper bits of the key, then each of those parts, which fits in a cache, by the lower ones.
// Between the two, an element is one word: lower bits of the key, then its id.
template <class T>
void sort_in_two_passes(const Keys<T>& keys, std::size_t count, std::uint32_t* ids,
                        std::uint32_t* spare, std::vector<LengthClass>& classes) {
    const int key_bits = bit_width(static_cast<std::uint64_t>(keys.top) - 1);
    const int id_bits = std::max(1, bit_width(count - 1));
    const int low_bits = std::min(32 - id_bits, (key_bits + 1) / 2);
    const std::size_t parts = std::size_t{1} << (key_bits - low_bits);
    const std::size_t low_keys = std::size_t{1} << low_bits;
    const std::uint32_t low_mask = static_cast<std::uint32_t>(low_keys) - 1;
    const int id_shift = 32 - low_bits;
    const std::uint32_t id_mask = static_cast<std::uint32_t>((std::uint64_t{1} << id_shift) - 1);
    std::vector<std::uint32_t> ends, begins(parts + 1), low_begins(low_keys + 1);
    counting_sort(
        count, parts, 0, [&](std::size_t i) { return keys(i) >> low_bits; },
        [&](std::uint32_t place, std::size_t i) {
            const std::uint64_t low = keys(i) & low_mask;
            spare[place] = static_cast<std::uint32_t>(low << id_shift | i);
        },
        ends, begins.data());
    for (std::size_t part = 0; part < parts; ++part) {
        const std::uint32_t* words = spare + begins[part];
        const std::size_t size = begins[part + 1] - begins[part];
        if (size == 0) {
            continue;
        }
        counting_sort(
            size, low_keys, begins[part],
            [&](std::size_t i) { return static_cast<std::uint64_t>(words[i]) >> id_shift; },
            [&](std::uint32_t place, std::size_t i) { ids[place] = words[i] & id_mask; }, ends,
            low_begins.data());
        const auto first_key = static_cast<std::int64_t>(part << low_bits);
        for (std::size_t low = 0; low < low_keys; ++low) {
            add_class(classes, keys.top - first_key - static_cast<std::int64_t>(low),
                      low_begins[low + 1] - low_begins[low]);
        }
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

Scan scan(const Lengths& lengths, std::int64_t row_length) {
    return with_type(lengths, [&](const auto* values) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
        using U = std::make_unsigned_t<T>;
        // All bits of (length - 1) at once: a length below 1 sets the highest of a signed type.
        U bits = 0;
        for (std::int64_t i = 0; i < lengths.count; ++i) {
            bits = static_cast<U>(bits | static_cast<U>(static_cast<U>(values[i]) - U{1}));
        }
        Scan found;
        const auto most = static_cast<std::uint64_t>(row_length);
        constexpr auto largest = static_cast<std::uint64_t>(std::numeric_limits<T>::max());
        if (bits >= largest) {
            found.too_small = find_outside(values, lengths.count, ~std::uint64_t{0});
        }
        found.top = static_cast<std::int64_t>(std::min<std::uint64_t>(bits, most) + 1);
        if (bits < most) {  // every length is at most bits + 1
            return found;
        }
        if (found.too_small < 0) {
            found.too_long = find_outside(values, lengths.count, most);
        }
        found.top = row_length + (found.too_long >= 0);
        return found;
    });
}

std::string length_text(const Lengths& lengths, std::int64_t index) {
    return with_type(lengths,
                     [index](const auto* values) { return std::to_string(values[index]); });
}

Sorted sort_by_length(const Lengths& lengths, const Scan& scanned, std::int64_t row_length,
                      bool truncate, std::uint32_t* ids, std::uint32_t* spare) {
    Sorted sorted;
    if (lengths.count == 0) {
        return sorted;
    }
    const std::int64_t top = truncate ? std::min(scanned.top, row_length) : scanned.top;
    with_type(lengths, [&](const auto* values) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
        const Keys<T> keys{values, top};
        const auto count = static_cast<std::size_t>(lengths.count);
        if (top <= kTwoPassKeys) {
            sort_in_two_passes(keys, count, ids, spare, sorted.classes);
        } else {
            sort_in_digits(keys, count, ids, sorted.classes);
        }
    });
    if (!sorted.classes.empty() && sorted.classes.front().length > row_length) {
        sorted.dropped = sorted.classes.front().count;
        sorted.classes.erase(sorted.classes.begin());
    }
    return sorted;
}

}  // namespace hermes
