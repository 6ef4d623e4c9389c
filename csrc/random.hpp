// Random numbers that are the same on every platform.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace hermes {

using Seed = std::array<std::uint64_t, 4>;  // not all zero

// Another seed for each number: the words mixed by splitmix64 (Steele, Lea and Flood, 2014).
inline Seed seed_for(Seed seed, std::uint64_t number) {
    for (std::uint64_t& word : seed) {
        number += 0x9e3779b97f4a7c15ULL;
        std::uint64_t z = word ^ number;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
        z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
        word = z ^ z >> 31;
    }
    seed[0] |= 1;
    return seed;
}

class Xoshiro256 {  // xoshiro256** 1.0 by Blackman and Vigna
public:
    explicit Xoshiro256(const Seed& seed) : s_(seed) {}
    std::uint64_t next() {
        const std::uint64_t result = rotate(s_[1] * 5, 7) * 9;
        const std::uint64_t t = s_[1] << 17;
        s_[2] ^= s_[0];
        s_[3] ^= s_[1];
        s_[1] ^= s_[2];
        s_[0] ^= s_[3];
        s_[2] ^= t;
        s_[3] = rotate(s_[3], 45);
        return result;
    }

private:
    static std::uint64_t rotate(std::uint64_t x, int by) {
        return x << by | x >> (64 - by);
    }
    Seed s_;
};

// Numbers below `bound`, `bound` - 1, ... from one random word, each as likely as another: a word
// that would favour some is drawn again (Brackett-Rozinsky and Lemire, 2024). The product of the
// bounds must be below 2^64.
template <std::size_t kDraws>
void draw_below(std::uint64_t bound, Xoshiro256& random, std::uint32_t* picks) {
    std::uint64_t product = 1;
    for (std::size_t i = 0; i < kDraws; ++i) {
        product *= bound - i;
    }
    for (;;) {
        std::uint64_t rest = random.next();
        for (std::size_t i = 0; i < kDraws; ++i) {
            const auto wide = static_cast<unsigned __int128>(rest) * (bound - i);
            picks[i] = static_cast<std::uint32_t>(wide >> 64);
            rest = static_cast<std::uint64_t>(wide);
        }
        if (rest >= product || rest >= (0 - product) % product) {
            return;
        }
    }
}

// Puts `count` elements, below 2^32, in an order of chance, by Fisher and Yates from the last one
// down: two of them a random word, four where the product of their bounds allows it.
template <class T>
void shuffle(T* elements, std::size_t count, Xoshiro256& random) {
    constexpr std::size_t kFourAWord = std::size_t{1} << 16, kAhead = 512;
    std::uint32_t picks[kAhead];
    std::size_t left = count;
    const auto swap_last = [&](std::size_t draws) {
        for (std::size_t i = 0; i < draws; ++i) {
            std::swap(elements[--left], elements[picks[i]]);
        }
    };
    while (left >= kFourAWord + kAhead) {  // may be in no cache
        for (std::size_t i = 0; i < kAhead; i += 2) {
            draw_below<2>(left - i, random, picks + i);
            __builtin_prefetch(elements + picks[i], 1);
            __builtin_prefetch(elements + picks[i + 1], 1);
        }
        swap_last(kAhead);
    }
    while (left > kFourAWord) {
        draw_below<2>(left, random, picks);
        swap_last(2);
    }
    while (left > 4) {
        draw_below<4>(left, random, picks);
        swap_last(4);
    }
    while (left > 1) {
        draw_below<1>(left, random, picks);
        swap_last(1);
    }
}

}  // namespace hermes
