// Products round once, multiplied and added, where the processor can: nothing here has to be equal
// on every platform, as plans have (setup.py).
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#include "attention.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "isa.hpp"
#include "threads.hpp"

namespace hermes {
namespace {

constexpr std::int64_t kRowsOfTile = 4;  // of a product, in registers
constexpr std::int64_t kDepth = 128;     // of a product's slice
constexpr std::int64_t kPanel = 64;      // lanes
constexpr std::int64_t kKeys = 64;       // of a tile
// Panels of a block, which reads each key once for all of them. Five times its queries is what a
// backward pass keeps, and should stay in a second-level cache.
constexpr std::int64_t kMostPanels = 4;
constexpr std::int64_t kBytesOfQueries = 1 << 17;
constexpr double kFlopsOfOneThread = 4e6;  // 20 us, which outweigh starting a thread
constexpr double kFlopsOfOneBlock = 1e5;   // half a microsecond, besides its products

constexpr std::int64_t whole_tiles(std::int64_t rows) {
    return (rows + kRowsOfTile - 1) / kRowsOfTile * kRowsOfTile;
}

struct Geometry {
    Geometry(const AttentionShape& shape, std::int64_t real_bytes)
        : heads(shape.heads),
          key_heads(shape.key_heads),
          group(shape.heads / shape.key_heads),
          size(shape.size),
          room((shape.size * real_bytes + 63) / 64 * 64 / real_bytes),
          lse_stride(shape.lse_stride),
          panels(std::clamp<std::int64_t>(kBytesOfQueries / (kPanel * room * real_bytes), 1,
                                          kMostPanels)),
          scale(shape.scale) {}

    std::int64_t heads, key_heads, group, size;
    std::int64_t room;  // for a head in scratch memory: whole cache lines
    std::int64_t lse_stride;
    std::int64_t panels;  // of a block, at most
    double scale;
};

struct Segment {
    std::int64_t start, lanes;
    std::int64_t first_block, blocks;  // of all segments' blocks, which are numbered through
};

// Queries of a segment that share a key head: some of its tokens times the heads of a group.
struct Block {
    std::int64_t start;              // of the segment
    std::int64_t first_lane, lanes;  // in the segment
    std::int64_t key_head;
    std::int64_t number;  // among the blocks of its key head
    bool is_last;         // of its segment
};

template <class R>
struct Arena {
    R* next;
    R* take(std::int64_t size) {
        R* const taken = next;
        next += size;
        return taken;
    }
};

template <class R>
struct KeySums {  // gradients of keys and values that are not yet whole, [T, K, H]
    R *dk, *dv;
};

using Counters = std::unique_ptr<std::atomic<std::int64_t>[]>;

Counters zeros(std::int64_t count) {
    return Counters(new std::atomic<std::int64_t>[static_cast<std::size_t>(count)]());
}

// Blocks of a segment add to its keys' gradients one after the other, the last one first, so that
// sums are the same whoever computes them.
class Turns {
public:
    Turns(std::int64_t blocks, std::int64_t key_heads)
        : key_heads_(key_heads), tiles_done_(zeros(blocks * key_heads)) {}

    void await(const Block& block, std::int64_t tile) const {
        if (!block.is_last) {
            const auto& before = tiles_done_[(block.number + 1) * key_heads_ + block.key_head];
            while (before.load(std::memory_order_acquire) <= tile) {
                std::this_thread::yield();
            }
        }
    }
    void pass(const Block& block, std::int64_t tile) {
        auto& done = tiles_done_[block.number * key_heads_ + block.key_head];
        done.store(tile + 1, std::memory_order_release);
    }

private:
    std::int64_t key_heads_;
    Counters tiles_done_;
};

// ---- hot loops, one body for each instruction set ---------------------------------------------

namespace scalar {
#define HERMES_TARGET
constexpr int kVectorBytes = 16;
constexpr int kColumns = HERMES_X86_DISPATCH ? 2 : 4;
#include "attention_blocks.hpp"
#undef HERMES_TARGET
}  // namespace scalar

#if HERMES_X86_DISPATCH
namespace avx2 {
#define HERMES_TARGET HERMES_TARGET_AVX2
constexpr int kVectorBytes = 32;
constexpr int kColumns = 2;
#include "attention_blocks.hpp"
#undef HERMES_TARGET
}  // namespace avx2

namespace avx512 {
#define HERMES_TARGET HERMES_TARGET_AVX512
constexpr int kVectorBytes = 64;
constexpr int kColumns = 4;
#include "attention_blocks.hpp"
#undef HERMES_TARGET
}  // namespace avx512
#endif

template <class Element>
void attend_block(const Geometry& g, const AttentionForward<Element>& arrays, const Block& block,
                  Real<Element>* scratch) {
    switch (active_isa()) {
#if HERMES_X86_DISPATCH
        case Isa::avx512: return avx512::attend_block(g, arrays, block, scratch);
        case Isa::avx2: return avx2::attend_block(g, arrays, block, scratch);
#endif
        default: return scalar::attend_block(g, arrays, block, scratch);
    }
}

template <class Element>
void differentiate_block(const Geometry& g, const AttentionBackward<Element>& arrays,
                         const KeySums<Real<Element>>& sums, const Block& block,
                         Real<Element>* scratch, Turns& turns) {
    switch (active_isa()) {
#if HERMES_X86_DISPATCH
        case Isa::avx512:
            return avx512::differentiate_block(g, arrays, sums, block, scratch, turns);
        case Isa::avx2: return avx2::differentiate_block(g, arrays, sums, block, scratch, turns);
#endif
        default: return scalar::differentiate_block(g, arrays, sums, block, scratch, turns);
    }
}

// ---- who computes what ------------------------------------------------------------------------

[[noreturn]] void refuse_start(const AttentionShape& shape, std::int64_t token) {
    throw std::invalid_argument(
        "starts[" + std::to_string(token) + "] is " + std::to_string(shape.starts[token]) +
        ", want " +
        (token == 0 ? "0"
                    : std::to_string(shape.starts[token - 1]) + " or " + std::to_string(token)));
}

// Longest first.
std::vector<Segment> segments_of(const AttentionShape& shape, const Geometry& g) {
    std::vector<Segment> segments;
    const std::int64_t most = g.panels * kPanel;
    std::int64_t first_block = 0;
    for (std::int64_t start = 0, end = 0; start < shape.tokens; start = end) {
        if (shape.starts[start] != start) {
            refuse_start(shape, start);
        }
        for (end = start + 1; end < shape.tokens && shape.starts[end] == start; ++end) {
        }
        const std::int64_t lanes = (end - start) * g.group, blocks = (lanes + most - 1) / most;
        segments.push_back({start, lanes, first_block, blocks});
        first_block += blocks;
    }
    std::sort(segments.begin(), segments.end(),
              [](const Segment& a, const Segment& b) { return a.lanes > b.lanes; });
    return segments;
}

std::int64_t blocks_of(const std::vector<Segment>& segments) {
    std::int64_t blocks = 0;
    for (const Segment& segment : segments) {
        blocks += segment.blocks;
    }
    return blocks;
}

// At most as many threads as are worth starting for so many products of scores by heads.
std::int64_t threads_for(const AttentionShape& shape, const Geometry& g,
                         const std::vector<Segment>& segments, double products) {
    double scores = 0;
    for (const Segment& segment : segments) {
        const auto lanes = static_cast<double>(segment.lanes);
        scores += lanes * lanes / static_cast<double>(2 * g.group);
    }
    const auto blocks = static_cast<double>(blocks_of(segments) * g.key_heads);
    const double flops = 2 * products * scores * static_cast<double>(g.size * g.key_heads) +
                         kFlopsOfOneBlock * blocks;
    const auto worth = static_cast<std::int64_t>(std::min(flops / kFlopsOfOneThread, blocks));
    return std::clamp<std::int64_t>(worth, 1, shape.threads);
}

// Calls work(block, thread) for every block of every key head, from several threads.
//
// A thread takes the blocks of a segment and key head one after the other, the last and longest
// first: then it waits for nobody's turn. Where none is left untouched, it helps with another's.
// Of a segment of one block it takes all key heads, whose lines lie side by side.
template <class Work>
void run(const Geometry& g, const std::vector<Segment>& segments, std::int64_t threads,
         const Work& work) {
    const auto chains = static_cast<std::int64_t>(segments.size()) * g.key_heads;
    const auto shared = g.key_heads * std::count_if(segments.begin(), segments.end(),
                                                    [](const Segment& s) { return s.blocks > 1; });
    const Counters taken = zeros(chains);
    std::atomic<std::int64_t> next{0};
    const auto work_on_chain = [&](std::int64_t chain, std::int64_t thread) {
        const Segment& segment = segments[static_cast<std::size_t>(chain / g.key_heads)];
        const std::int64_t most = g.panels * kPanel;
        while (taken[chain].load(std::memory_order_relaxed) < segment.blocks) {
            const std::int64_t i = segment.blocks - 1 - taken[chain]++;
            if (i >= 0) {
                work({segment.start, i * most, std::min(segment.lanes - i * most, most),
                      chain % g.key_heads, segment.first_block + i, i + 1 == segment.blocks},
                     thread);
            }
        }
    };
    const auto work_as = [&](std::int64_t thread) {
        for (std::int64_t i = next++; i < chains; i = next++) {
            const std::int64_t first = i < shared ? i : shared + (i - shared) * g.key_heads;
            const std::int64_t end = i < shared ? i + 1 : first + g.key_heads;
            for (std::int64_t chain = first; chain < std::min(end, chains); ++chain) {
                work_on_chain(chain, thread);
            }
        }
        for (std::int64_t i = 0; i < chains; ++i) {
            work_on_chain((thread + i) % chains, thread);
        }
    };
    in_threads(threads, work_as);
}

}  // namespace

template <class Element>
void attend(const AttentionShape& shape, const AttentionForward<Element>& arrays) {
    using R = Real<Element>;
    const Geometry g(shape, sizeof(R));
    const std::vector<Segment> segments = segments_of(shape, g);
    const std::int64_t threads = threads_for(shape, g, segments, 2);
    const std::int64_t size =
        kKeys * (2 * g.room + kPanel) + kPanel + g.panels * kPanel * (2 * g.room + 3);
    Buffer<R> scratch(static_cast<std::size_t>(threads * size));
    run(g, segments, threads, [&](const Block& block, std::int64_t thread) {
        attend_block(g, arrays, block, scratch.data() + thread * size);
    });
}

template <class Element>
void differentiate_attention(const AttentionShape& shape,
                             const AttentionBackward<Element>& arrays) {
    using R = Real<Element>;
    const Geometry g(shape, sizeof(R));
    const std::vector<Segment> segments = segments_of(shape, g);
    const std::int64_t threads = threads_for(shape, g, segments, 5);
    const std::int64_t size =
        kKeys * (4 * g.room + 2 * kPanel) + g.panels * kPanel * (5 * g.room + 3);
    Buffer<R> scratch(static_cast<std::size_t>(threads * size));
    Turns turns(blocks_of(segments), g.key_heads);
    // Reals are summed where they will stay; others in memory that only long segments touch.
    Buffer<R> memory;
    KeySums<R> sums{};
    if constexpr (std::is_same_v<Element, R>) {
        sums = {arrays.dk, arrays.dv};
    } else {
        const auto keys = static_cast<std::size_t>(shape.tokens * shape.key_heads * shape.size);
        memory = Buffer<R>(2 * keys);
        sums = {memory.data(), memory.data() + keys};
    }
    run(g, segments, threads, [&](const Block& block, std::int64_t thread) {
        differentiate_block(g, arrays, sums, block, scratch.data() + thread * size, turns);
    });
}

#define HERMES_INSTANTIATE(Element)                                                \
    template void attend(const AttentionShape&, const AttentionForward<Element>&); \
    template void differentiate_attention(const AttentionShape&, const AttentionBackward<Element>&);
HERMES_INSTANTIATE(float)
HERMES_INSTANTIATE(double)
HERMES_INSTANTIATE(Bfloat16)
HERMES_INSTANTIATE(Float16)
#undef HERMES_INSTANTIATE

}  // namespace hermes
