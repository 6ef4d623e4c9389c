// Memory for the arrays of a batch, used again when they die.
//
// A new array of a few megabytes is a page fault for every 4 KiB, which takes ten times as long as
// writing it. A batch is as large as the one before it, so memory that came back is given out warm.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "buffer.hpp"

namespace hermes {

using Block = Buffer<std::uint8_t>;

constexpr std::size_t kPoolBlocks = 32;
constexpr std::size_t kPoolBytes = std::size_t{256} << 20;

// Never wait and never fail for the pool's sake: where another thread, or one that a fork left
// behind, holds it, memory comes from the system and goes back there.
Block take_block(std::size_t size);  // at least so many bytes, as whoever had them left them
void give_block(Block block) noexcept;
std::pair<std::size_t, std::size_t> pool_state();  // blocks and bytes in it; 0 where it is held

}  // namespace hermes
