#include "shards.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace hermes {
namespace {

[[noreturn]] void fail(const std::string& message) {
    throw std::invalid_argument(message);
}

void will_need(const void* begin, std::int64_t bytes) {
    static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    const std::uintptr_t start = address / page * page;
    if (bytes > 0) {  // a hint: failure costs speed alone
        ::posix_madvise(reinterpret_cast<void*>(start),
                        address + static_cast<std::uintptr_t>(bytes) - start, POSIX_MADV_WILLNEED);
    }
}

}  // namespace

ShardTable::ShardTable(std::vector<std::int64_t> first_samples)
    : first_samples_(std::move(first_samples)) {
    if (first_samples_.empty() || first_samples_[0] != 0 ||
        !std::is_sorted(first_samples_.begin(), first_samples_.end())) {
        fail("first_samples does not rise from 0");
    }
    shards_.resize(first_samples_.size() - 1);
    there_ = std::make_unique<std::atomic<bool>[]>(shards_.size());
}

std::int64_t ShardTable::shard_of(std::int64_t sample) const {
    return std::upper_bound(first_samples_.begin(), first_samples_.end(), sample) -
           first_samples_.begin() - 1;
}

void ShardTable::put(std::int64_t shard, const Shard& what) {
    const auto i = static_cast<std::size_t>(shard);
    const std::int64_t wanted = first_samples_[i + 1] - first_samples_[i];
    if (what.samples != wanted) {
        fail("shard " + std::to_string(shard) + " has " + std::to_string(what.samples) +
             " samples, want " + std::to_string(wanted));
    }
    shards_[i] = what;
    there_[i].store(true, std::memory_order_release);
}

Places find_places(const ShardTable& table, const Request& request) {
    Places found;
    found.row_ends.reserve(static_cast<std::size_t>(request.row_count));
    std::int64_t shard = -1, first = 0, end = 0;  // the samples of the last shard that was asked
    for (std::int64_t r = 0; r < request.row_count; ++r) {
        const std::int64_t row = request.rows[r];
        if (row < 0 || row >= request.plan_rows) {
            fail("rows[" + std::to_string(r) + "] is " + std::to_string(row) + ", outside [0, " +
                 std::to_string(request.plan_rows) + ")");
        }
        const std::int64_t from = request.row_offsets[row], to = request.row_offsets[row + 1];
        if (from < 0 || to < from || to > request.places) {
            fail("row " + std::to_string(row) + " of the plan has samples [" +
                 std::to_string(from) + ", " + std::to_string(to) + ") of " +
                 std::to_string(request.places) + ": the plan is corrupt");
        }
        if (to - from > request.row_length) {  // bounds the memory that any plan can ask for
            fail("row " + std::to_string(row) + " of the plan has " + std::to_string(to - from) +
                 " samples, more than the " + std::to_string(request.row_length) +
                 " tokens of a row: the plan is corrupt");
        }
        for (std::int64_t i = from; i < to; ++i) {
            const std::int64_t sample = request.samples[i];
            if (sample < first || sample >= end) {
                if (sample < 0 || sample >= table.samples()) {
                    fail("the plan names sample " + std::to_string(sample) + " but there are " +
                         std::to_string(table.samples()) + ": it was made for other samples");
                }
                shard = table.shard_of(sample);
                first = table.first_samples()[static_cast<std::size_t>(shard)];
                end = table.first_samples()[static_cast<std::size_t>(shard) + 1];
                if (table.find(shard) == nullptr) {
                    found.missing.push_back(shard);
                }
            }
            found.places.push_back({shard, sample - first});
        }
        found.row_ends.push_back(static_cast<std::int64_t>(found.places.size()));
    }
    std::sort(found.missing.begin(), found.missing.end());
    found.missing.erase(std::unique(found.missing.begin(), found.missing.end()),
                        found.missing.end());
    return found;
}

void read_ahead(const ShardTable& table, const Places& places, std::int64_t row_length) {
    // What a place needs is found by reading where it lies, so all of that is asked for first.
    constexpr std::int64_t two_offsets = 2 * sizeof(std::int64_t);
    constexpr std::int64_t one_span = 2 * sizeof(std::uint32_t);
    for (const Place& place : places.places) {
        const Shard& shard = *table.find(place.shard);
        will_need(shard.offsets + place.sample, two_offsets);
        will_need(shard.span_offsets + place.sample, two_offsets);
    }
    for (const Place& place : places.places) {
        const Shard& shard = *table.find(place.shard);
        const std::int64_t begin = shard.offsets[place.sample];
        const std::int64_t end = shard.offsets[place.sample + 1];
        if (begin >= 0 && begin < end && end <= shard.token_count) {  // else building will say so
            will_need(static_cast<const std::uint8_t*>(shard.tokens) + begin * shard.token_bytes,
                      std::min(end - begin, row_length) * shard.token_bytes);
        }
        const std::int64_t first = shard.span_offsets[place.sample];
        const std::int64_t last = shard.span_offsets[place.sample + 1];
        if (first >= 0 && first < last && last <= shard.span_count) {
            will_need(shard.spans + 2 * first, (last - first) * one_span);
        }
    }
}

}  // namespace hermes
