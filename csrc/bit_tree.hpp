// A set of small numbers whose first, and the next from any, is near however few there are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hermes {

class BitTree {  // a bit of a level is set where a word of 64 bits of the level below is not 0
public:
    explicit BitTree(std::size_t size) : end_(size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size);
        } while (size > 1);
    }
    bool empty() const {
        return levels_.back()[0] == 0;
    }
    std::size_t end() const {
        return end_;
    }
    bool has(std::size_t i) const {
        return levels_[0][i / 64] >> i % 64 & 1;
    }
    void add(std::size_t i) {
        for (auto& level : levels_) {
            level[i / 64] |= std::uint64_t{1} << i % 64;
            i /= 64;
        }
    }
    void remove(std::size_t i) {
        for (auto& level : levels_) {
            std::uint64_t& word = level[i / 64];
            word &= ~(std::uint64_t{1} << i % 64);
            if (word != 0) {
                return;
            }
            i /= 64;
        }
    }
    std::size_t first() const {  // the set is not empty
        return down(levels_.size(), 0);
    }
    std::size_t next(std::size_t i) const {  // the first from i on, or the end
        if (i >= end_) {
            return end_;
        }
        std::size_t up = 0;
        std::uint64_t word = levels_[0][i / 64] >> i % 64;
        while (word == 0) {  // nothing in this word: look behind it, a level higher
            if (++up == levels_.size()) {
                return end_;
            }
            i = i / 64 + 1;
            word = i / 64 < levels_[up].size() ? levels_[up][i / 64] >> i % 64 : 0;
        }
        return down(up, i + static_cast<std::size_t>(__builtin_ctzll(word)));
    }

private:
    // The first number under word `i` of the level below `up`.
    std::size_t down(std::size_t up, std::size_t i) const {
        while (up > 0) {
            i = i * 64 + static_cast<std::size_t>(__builtin_ctzll(levels_[--up][i]));
        }
        return i;
    }

    std::vector<std::vector<std::uint64_t>> levels_;
    std::size_t end_;
};

}  // namespace hermes
