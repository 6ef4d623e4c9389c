// A set of small numbers whose first, and the next from any, is near however few there are.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace hermes {

class BitTree {  // a bit of a level is set where a word of 64 bits of the level below is not 0
public:
    explicit BitTree(std::size_t size) : end_(size) {
        do {
            size = (size + 63) / 64;
            begins_[levels_++] = words_.size();
            words_.resize(words_.size() + size);
        } while (size > 1);
        begins_[levels_] = words_.size();
    }
    bool empty() const {
        return words_.back() == 0;
    }
    std::size_t end() const {
        return end_;
    }
    bool has(std::size_t i) const {
        return words_[i / 64] >> i % 64 & 1;
    }
    void add(std::size_t i) {
        for (std::size_t level = 0; level < levels_; ++level) {
            std::uint64_t& word = words_[begins_[level] + i / 64];
            const bool was_empty = word == 0;
            word |= std::uint64_t{1} << i % 64;
            if (!was_empty) {
                return;
            }
            i /= 64;
        }
    }
    void remove(std::size_t i) {
        for (std::size_t level = 0; level < levels_; ++level) {
            std::uint64_t& word = words_[begins_[level] + i / 64];
            word &= ~(std::uint64_t{1} << i % 64);
            if (word != 0) {
                return;
            }
            i /= 64;
        }
    }
    std::size_t first() const {  // the set is not empty
        return down(levels_ - 1, static_cast<std::size_t>(__builtin_ctzll(words_.back())));
    }
    std::size_t last() const {  // the set is not empty
        std::size_t i = 0;
        for (std::size_t level = levels_; level-- > 0;) {
            i = i * 64 + 63 - static_cast<std::size_t>(__builtin_clzll(words_[begins_[level] + i]));
        }
        return i;
    }
    std::size_t next(std::size_t i) const {  // the first from i on, or the end
        if (i >= end_) {
            return end_;
        }
        const std::uint64_t here = words_[i / 64] >> i % 64;
        return here != 0 ? i + static_cast<std::size_t>(__builtin_ctzll(here)) : next_beyond(i);
    }

private:
    // The first whose word comes after that of i, found a level higher.
    std::size_t next_beyond(std::size_t i) const {
        for (std::size_t level = 1; level < levels_; ++level) {
            i = i / 64 + 1;
            const std::size_t at = begins_[level] + i / 64;
            const std::uint64_t word = at < begins_[level + 1] ? words_[at] >> i % 64 : 0;
            if (word != 0) {
                return down(level, i + static_cast<std::size_t>(__builtin_ctzll(word)));
            }
        }
        return end_;
    }

    // The first number under bit `i` of a level.
    std::size_t down(std::size_t level, std::size_t i) const {
        while (level > 0) {
            const std::uint64_t word = words_[begins_[--level] + i];
            i = i * 64 + static_cast<std::size_t>(__builtin_ctzll(word));
        }
        return i;
    }

    std::array<std::size_t, 8> begins_{};  // of each level in words_
    std::size_t levels_ = 0;
    std::vector<std::uint64_t> words_;
    std::size_t end_;
};

}  // namespace hermes
