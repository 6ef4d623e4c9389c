// Rows of a batch, straight from the shards of a token store: input ids, labels, positions.
#pragma once

#include <cstdint>
#include <vector>

#include "shards.hpp"

namespace hermes {

constexpr std::int64_t kIgnoreIndex = -100;
constexpr std::int64_t kMaxThreads = 1024;

struct Segment {         // one sample in its row, or the padding behind the last one
    const void* tokens;  // null: padding
    const std::uint32_t* spans;
    std::int64_t span_count;
    std::int64_t start;  // in the flat batch
    std::int64_t length;
    int token_bytes;
    Place place;  // for errors
};

// Checks every offset and span that fill_rows will follow, and counts what it will write.
// Throws std::invalid_argument: the store is corrupt, or the plan belongs to other samples.
struct Layout {
    std::vector<Segment> segments;
    std::int64_t kept = 0;  // labels that will not be kIgnoreIndex
};
Layout lay_out_rows(const ShardTable& table, const Places& places, const Request& request);

template <class Id>  // std::int32_t or std::int64_t
struct Batch {       // rows * row_length places each; none overlaps another
    Id* input_ids;
    Id* labels;
    Id* positions;
};
// The same bytes for any number of threads in [1, kMaxThreads]. Throws std::invalid_argument: a
// token id exceeds Id.
template <class Id>
void fill_rows(const Layout& layout, Id pad_id, const Batch<Id>& batch, std::int64_t threads);

// Where each segment starts, then the end: one more than there are segments.
void fill_cu_seqlens(const Layout& layout, std::int32_t* cu_seqlens);

}  // namespace hermes
