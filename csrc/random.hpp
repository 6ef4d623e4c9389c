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
    std::uint32_t below(std::uint32_t bound) {  // the bias is below bound / 2^64
        return static_cast<std::uint32_t>(static_cast<unsigned __int128>(next()) * bound >> 64);
    }
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

// Puts `count` elements in an order of chance, by Fisher and Yates from the last one down.
template <class T>
void shuffle(T* elements, std::size_t count, Xoshiro256& random) {
    for (std::size_t i = count; i > 1; --i) {
        std::swap(elements[i - 1], elements[random.below(static_cast<std::uint32_t>(i))]);
    }
}

}  // namespace hermes
