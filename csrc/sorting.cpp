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

[[noreturn]] void refuse_changed() {
    throw std::invalid_argument("lengths changed while they were read; pass a copy of them");
}

// Keys fall into parts by their upper bits. Ids are first written part after part, as many streams
// as a cache and its TLB can follow; then each part, which mostly fits in a cache, is sorted by the
// lower bits. Between the two, an element is one word: lower bits of the key, then its id.
//
// Shifts by a number that the compiler does not know take three steps, a product one: of
// key * 2^(32 - low_bits), the upper half is the part, the lower half begins the word.
struct Parts {
    int low_bits;
    std::size_t slots;  // a power of two: so many parts there might be
    std::size_t block;  // so many elements are written between two looks at where the parts end
};

Parts parts_of(const std::vector<std::uint32_t>& begins, std::int64_t count) {
    constexpr std::size_t most = 288;  // streams
    const std::size_t keys = begins.size() - 1;
    const int id_bits = std::max(1, bit_width(static_cast<std::uint64_t>(count) - 1));
    int low_bits = 0;
    for (; low_bits < 32 - id_bits; ++low_bits) {
        std::size_t streams = 0;
        for (std::size_t key = 0; key < keys; key += std::size_t{1} << low_bits) {
            const std::size_t end = std::min(key + (std::size_t{1} << low_bits), keys);
            streams += begins[end] != begins[key];
        }
        if (streams <= most) {
            break;
        }
    }
    const std::size_t slots = std::size_t{1} << bit_width((keys - 1) >> low_bits);
    const auto all = static_cast<std::size_t>(count);
    return {low_bits, slots, std::min(all, std::max<std::size_t>(4096, 4 * slots))};
}

// Writes each element into its part. Lengths that another thread changes no longer have the counts
// that the scan found: a part then grows into others, and past the end by a block at most.
template <class K>
void write_parts(const K& keys, std::size_t count, const Parts& parts,
                 const std::vector<std::uint32_t>& begins, std::uint32_t* spare) {
    constexpr std::size_t group = 8, ahead = 1024, line = 64 / sizeof *spare;
    std::vector<std::uint32_t*> begin_of(parts.slots + 1, spare + count);
    for (std::size_t key = 0; key + 1 < begins.size(); key += std::size_t{1} << parts.low_bits) {
        begin_of[key >> parts.low_bits] = spare + begins[key];
    }
    std::vector<std::uint32_t*> end_of(begin_of.begin(), begin_of.end() - 1);
    std::uint32_t** ends = end_of.data();
    const std::size_t slot_mask = parts.slots - 1;
    const std::uint64_t factor = std::uint64_t{1} << (32 - parts.low_bits);
    const auto write = [=](std::size_t i) {
        const std::uint64_t key = keys(i) * factor;
        std::uint32_t* const place = ends[key >> 32 & slot_mask]++;
        *place = static_cast<std::uint32_t>(key | i);
        __builtin_prefetch(place + line, 1);  // too many streams for the hardware to foresee
    };
    std::size_t i = 0;
    while (i < count) {
        const std::size_t block_end = std::min(count, i + parts.block);
        for (; i + group <= block_end; i += group) {
            __builtin_prefetch(keys.lengths + i + ahead);
#pragma GCC unroll 8
            for (std::size_t k = i; k < i + group; ++k) {
                write(k);
            }
        }
        for (; i < block_end; ++i) {
            write(i);
        }
        if (*std::max_element(end_of.begin(), end_of.end()) > spare + count) {
            refuse_changed();
        }
    }
    if (!std::equal(end_of.begin(), end_of.end(), begin_of.begin() + 1)) {
        refuse_changed();
    }
}

// Gives the ids of each part, once they are sorted in a buffer that mostly stays in a cache.
void give_parts(const Parts& parts, const std::vector<std::uint32_t>& begins, std::uint32_t* spare,
                const Take& take) {
    const std::size_t keys = begins.size() - 1, width = std::size_t{1} << parts.low_bits;
    const std::uint32_t id_mask = ~std::uint32_t{0} >> parts.low_bits;
    std::size_t largest = 0;
    for (std::size_t key = 0; key < keys; key += width) {
        largest = std::max<std::size_t>(largest, begins[std::min(key + width, keys)] - begins[key]);
    }
    // Lengths that changed may have other counts: no place is past twice the part all the same.
    Buffer<std::uint32_t> ids(parts.low_bits == 0 ? 0 : 2 * largest);
    std::vector<std::uint32_t> places(width);
    for (std::size_t key = 0; key < keys; key += width) {
        const std::size_t next = std::min(key + width, keys);
        std::uint32_t* const words = spare + begins[key];
        const std::uint32_t count = begins[next] - begins[key];
        if (parts.low_bits == 0) {
            take(words, count);
            continue;
        }
        std::fill(places.begin(), places.end(), 0U);
        for (std::size_t k = key; k < next; ++k) {
            places[k - key] = begins[k] - begins[key];
        }
        std::uint32_t* const at = places.data();
        std::uint32_t* const sorted = ids.data();
#pragma GCC unroll 8
        for (std::uint32_t i = 0; i < count; ++i) {
            const std::uint32_t word = words[i];
            sorted[at[word * std::uint64_t{width} >> 32]++] = word & id_mask;
        }
        for (std::size_t k = key; k < next; ++k) {
            if (places[k - key] != begins[k + 1] - begins[key]) {
                refuse_changed();
            }
        }
        take(sorted, count);
    }
}

// By the lowest digit first; a digit has as many streams as a cache and its TLB can follow.
template <class T>
void sort_in_digits(const Keys<T>& keys, std::size_t count, std::uint32_t* ids,
                    std::vector<LengthClass>& classes) {
    constexpr int digit_bits = 8, digits = 32 / digit_bits;
    constexpr std::size_t line = 64 / sizeof(std::uint64_t);
    const auto digit_of = [](std::uint64_t key, int digit) {
        return static_cast<std::uint8_t>(key >> (digit * digit_bits));
    };
    Buffer<std::uint64_t> pairs(count), other(count);  // key, then id
    std::array<std::array<std::size_t, (1 << digit_bits) + 1>, digits> all_starts{};
    for (std::size_t id = 0; id < count; ++id) {
        const std::uint64_t key = keys(id);
        pairs[id] = key << 32 | id;
        for (int digit = 0; digit < digits; ++digit) {
            ++all_starts[digit][digit_of(key, digit) + 1];
        }
    }
    for (int digit = 0; keys.top >> (digit * digit_bits) != 0; ++digit) {
        auto& starts = all_starts[digit];
        std::partial_sum(starts.begin(), starts.end(), starts.begin());
        for (const std::uint64_t pair : pairs) {
            std::uint64_t* const place = other.data() + starts[digit_of(pair >> 32, digit)]++;
            *place = pair;
            __builtin_prefetch(place + line, 1);
        }
        std::swap(pairs, other);
    }
    std::size_t different = 0;
    for (std::size_t i = 0; i < count; ++i) {
        different += i == 0 || pairs[i] >> 32 != pairs[i - 1] >> 32;
    }
    reserve_in_huge_pages(classes, different);
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

std::size_t spare_words(const Lengths& lengths, const Scan& scanned) {
    const auto count = static_cast<std::size_t>(lengths.count);
    return scanned.begins.empty() ? count : count + parts_of(scanned.begins, lengths.count).block;
}

Sorted sort_lengths(const Lengths& lengths, const Scan& scanned, std::int64_t row_length,
                    std::uint32_t* spare) {
    Sorted sorted;
    if (lengths.count == 0) {
        return sorted;
    }
    if (scanned.begins.empty()) {
        with_type(lengths, [&](const auto* values) {
            using T = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
            sort_in_digits(Keys<T>{values, scanned.top}, static_cast<std::size_t>(lengths.count),
                           spare, sorted.classes);
        });
    }
    for (std::size_t key = 0; key + 1 < scanned.begins.size(); ++key) {
        const std::uint32_t* begin = scanned.begins.data() + key;
        if (begin[1] != begin[0]) {
            sorted.classes.push_back(
                {scanned.top - static_cast<std::int64_t>(key), begin[1] - begin[0]});
        }
    }
    // A length may have been 0 while it was counted, and not when it was checked.
    const bool all_counted = scanned.begins.empty() || scanned.begins.back() == lengths.count;
    if (!all_counted || sorted.classes.back().length < 1 ||
        (scanned.too_long < 0 && sorted.classes.front().length > row_length)) {
        refuse_changed();
    }
    if (sorted.classes.front().length > row_length) {
        sorted.dropped = sorted.classes.front().count;
        sorted.classes.erase(sorted.classes.begin());
    }
    return sorted;
}

void give_sorted(const Lengths& lengths, const Scan& scanned, std::uint32_t* spare,
                 const Take& take) {
    const auto count = static_cast<std::size_t>(lengths.count);
    if (scanned.begins.empty()) {
        take(spare, count);
        return;
    }
    const Parts parts = parts_of(scanned.begins, lengths.count);
    with_type(lengths, [&](const auto* values) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
        if (scanned.too_long < 0) {
            const FittingKeys<T> fitting{values, scanned.top};
            write_parts(fitting, count, parts, scanned.begins, spare);
        } else {
            write_parts(Keys<T>{values, scanned.top}, count, parts, scanned.begins, spare);
        }
    });
    give_parts(parts, scanned.begins, spare, take);
}

}  // namespace hermes
