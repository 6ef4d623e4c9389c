// Samples by falling length: what every decreasing strategy begins with.
#pragma once

#include <cstdint>
#include <string>
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

struct LengthClass {
    std::int64_t length;
    std::int64_t count;
};

struct Sorted {
    std::vector<LengthClass> classes;  // by falling length, without the dropped
    std::int64_t dropped = 0;          // how many of the ids, from their start, are too long
};

// What a scan of all lengths found; a length outside [1, row_length] is no error by itself.
struct Scan {
    std::int64_t top = 0;         // no length is above; at most row_length + 1, "too long"
    std::int64_t too_small = -1;  // index of the first length below 1, or -1
    std::int64_t too_long = -1;   // index of the first length above row_length, or -1
    // Where the ids of each length begin, from `top` down, and their end; empty where that many
    // lengths are possible that few samples share one.
    std::vector<std::uint32_t> begins;
};

// Lengths above row_length are counted as row_length with `truncate`.
Scan scan(const Lengths& lengths, std::int64_t row_length, bool truncate);

// The value at `index`, for a message.
std::string length_text(const Lengths& lengths, std::int64_t index);

// Writes all ids by falling length, ties by id; `ids` and `spare` have room for one each. Lengths
// above row_length come first and are counted as dropped. No length may be below 1.
Sorted sort_by_length(const Lengths& lengths, const Scan& scanned, std::int64_t row_length,
                      std::uint32_t* ids, std::uint32_t* spare);

}  // namespace hermes
