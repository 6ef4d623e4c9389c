// Rows of a batch, straight from the shards of a token store: input ids, labels, positions.
#pragma once

#include <cstdint>
#include <vector>

namespace hermes {

constexpr std::int64_t kIgnoreIndex = -100;

struct Shard {
    const void* tokens;  // uint16 or uint32, token_count of them
    int token_bytes;     // 2 or 4
    std::int64_t token_count;
    const std::int64_t* offsets;  // [samples + 1] into tokens
    const std::uint32_t* spans;   // [span_count, 2] kept [start, end) inside a sample
    std::int64_t span_count;
    const std::int64_t* span_offsets;  // [samples + 1] into spans
    std::int64_t samples;
};

// Which samples stand in which row: row r holds places [row_starts[r], row_starts[r + 1]).
struct Request {
    std::vector<Shard> shards;
    const std::int64_t* shard_of;   // [places] index into shards
    const std::int64_t* sample_of;  // [places] index inside the shard
    std::int64_t places;
    const std::int64_t* row_starts;  // [rows + 1], from 0 to places, never falling
    std::int64_t rows;
    std::int64_t row_length;
    std::int64_t pad_id;
    bool truncate;  // a sample longer than a row gives its first row_length tokens; else an error
};

struct Segment {         // one sample in its row, or the padding behind the last one
    const Shard* shard;  // null: padding
    std::int64_t sample;
    std::int64_t start;  // in the flat batch
    std::int64_t length;
};

// Checks every index, offset and span that fill_rows will follow, and counts what it will write.
// Throws std::invalid_argument: the store is corrupt, or the plan belongs to other samples.
struct Layout {
    std::vector<Segment> segments;
    std::int64_t kept = 0;
};
Layout lay_out_rows(const Request& request);

// input_ids, labels and positions have rows * row_length places; kept has layout.kept; cu_seqlens
// has one more than there are segments.
struct Batch {
    std::int64_t* input_ids;
    std::int64_t* labels;
    std::int64_t* positions;
    std::int64_t* kept;
    std::int32_t* cu_seqlens;
};
void fill_rows(const Request& request, const Layout& layout, const Batch& batch);

}  // namespace hermes
