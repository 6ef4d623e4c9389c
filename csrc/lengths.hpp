// Lengths of samples, as they lie in memory: an array of any integer type.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace hermes {

constexpr std::int64_t kMaxSamples = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t kMaxRowLength = std::int64_t{1} << 31;

enum class Dtype { int8, int16, int32, int64, uint8, uint16, uint32, uint64 };

struct Lengths {  // an array as it lies in memory: never copied, never widened as a whole
    const void* data;
    std::int64_t count;
    Dtype dtype;
};

// The value at `index`, for a message.
std::string length_text(const Lengths& lengths, std::int64_t index);

// No length is longer than this, nor it than `most`.
std::int64_t longest_of(const Lengths& lengths, std::int64_t most);

// The lengths of the samples order[begin] to order[end] or, without it, `begin` to `end`: those
// outside [1, most] as the nearest inside.
void read_lengths(const Lengths& lengths, const std::uint32_t* order, std::int64_t begin,
                  std::int64_t end, std::int64_t most, std::uint32_t* out);

// Takes the ids of samples longer than `most` out of `ids`, in which all are; gives them, rising.
std::vector<std::int64_t> drop_longer(const Lengths& lengths, std::int64_t most,
                                      std::uint32_t* ids);

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

}  // namespace hermes
