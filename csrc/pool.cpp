#include "pool.hpp"

#include <algorithm>
#include <array>
#include <atomic>

namespace hermes {
namespace {

struct Pool {
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
    std::array<Block, kPoolBlocks> blocks;  // [count], the longest unused first
    std::size_t count = 0;
    std::size_t bytes = 0;

    Block remove(std::size_t i) {
        Block block = std::move(blocks[i]);
        std::move(blocks.begin() + i + 1, blocks.begin() + count, blocks.begin() + i);
        bytes -= block.size();
        --count;
        return block;
    }
};

Pool& pool() {
    static Pool* const made = new Pool;  // never freed: arrays may die after static objects do
    return *made;
}

class Hold {
public:
    Hold() : held_(!pool().busy.test_and_set(std::memory_order_acquire)) {}
    ~Hold() {
        if (held_) {
            pool().busy.clear(std::memory_order_release);
        }
    }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;
    explicit operator bool() const {
        return held_;
    }

private:
    bool held_;
};

}  // namespace

Block take_block(std::size_t size) {
    if (const Hold hold; hold) {
        Pool& all = pool();
        for (std::size_t i = all.count; i-- > 0;) {  // the last to come back is the warmest
            if (all.blocks[i].size() >= size && all.blocks[i].size() / 2 <= size) {
                return all.remove(i);
            }
        }
    }
    return Block(size);
}

void give_block(Block block) noexcept {
    std::array<Block, kPoolBlocks> out;  // freed when nothing is held any more
    std::size_t evicted = 0;
    if (const Hold hold; hold && block.size() <= kPoolBytes) {  // so an empty pool has room for it
        Pool& all = pool();
        while (all.count == kPoolBlocks || all.bytes + block.size() > kPoolBytes) {
            out[evicted++] = all.remove(0);
        }
        all.bytes += block.size();
        all.blocks[all.count++] = std::move(block);
    }
}

std::pair<std::size_t, std::size_t> pool_state() {
    const Hold hold;
    return hold ? std::pair{pool().count, pool().bytes} : std::pair{std::size_t{0}, std::size_t{0}};
}

}  // namespace hermes
