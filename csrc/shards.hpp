// Shards of a token store, found by sample, and the samples that some rows of a plan ask for.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace hermes {

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

// Shards whose samples are numbered through; each is put in when a sample of it is first needed.
class ShardTable {
public:
    // first_samples: the number of each shard's first sample, then of all; from 0, never falling.
    explicit ShardTable(std::vector<std::int64_t> first_samples);

    std::int64_t shards() const {
        return static_cast<std::int64_t>(first_samples_.size()) - 1;
    }
    std::int64_t samples() const {
        return first_samples_.back();
    }
    const std::vector<std::int64_t>& first_samples() const {
        return first_samples_;
    }
    std::int64_t shard_of(std::int64_t sample) const;  // sample in [0, samples())
    const Shard* find(std::int64_t shard) const {      // null until it is put in
        const auto i = static_cast<std::size_t>(shard);
        return there_[i].load(std::memory_order_acquire) ? &shards_[i] : nullptr;
    }
    // Once for each shard, by one thread at a time; others may read meanwhile.
    void put(std::int64_t shard, const Shard& what);

private:
    std::vector<std::int64_t> first_samples_;
    std::vector<Shard> shards_;
    std::unique_ptr<std::atomic<bool>[]> there_;
};

// Which rows of which plan: row r holds samples[row_offsets[r]] to samples[row_offsets[r + 1]].
struct Request {
    const std::int64_t* samples;  // [places]
    std::int64_t places;
    const std::int64_t* row_offsets;  // [plan_rows + 1]
    std::int64_t plan_rows;
    const std::int64_t* rows;  // [row_count] numbers of rows of the plan
    std::int64_t row_count;
    std::int64_t row_length;
    bool truncate;  // a sample longer than a row gives its first row_length tokens; else an error
};

struct Place {
    std::int64_t shard;
    std::int64_t sample;  // inside the shard
};

struct Places {
    std::vector<Place> places;           // row after row
    std::vector<std::int64_t> row_ends;  // [row_count] into places
    std::vector<std::int64_t> missing;   // shards of them that the table lacks, each once
};

// Throws std::invalid_argument: a row number out of range, or a plan of other samples.
Places find_places(const ShardTable& table, const Request& request);

// Asks the kernel to read what the places will need from their files, and does not wait for tokens.
void read_ahead(const ShardTable& table, const Places& places, std::int64_t row_length);

}  // namespace hermes
