#include "lengths.hpp"

#include <algorithm>

namespace hermes {

std::string length_text(const Lengths& lengths, std::int64_t index) {
    return with_type(lengths,
                     [index](const auto* values) { return std::to_string(values[index]); });
}

std::int64_t longest_of(const Lengths& lengths, std::int64_t most) {
    return with_type(lengths, [&](const auto* values) {
        const std::uint64_t bits = bits_of(values, lengths.count);  // of (length - 1)
        return static_cast<std::int64_t>(std::min(bits, static_cast<std::uint64_t>(most - 1))) + 1;
    });
}

std::vector<std::int64_t> drop_longer(const Lengths& lengths, std::int64_t most,
                                      std::uint32_t* ids) {
    return with_type(lengths, [&](const auto* values) {
        std::uint32_t* kept = ids;
        std::vector<std::int64_t> dropped;
        for (std::int64_t i = 0; i < lengths.count; ++i) {
            if (static_cast<std::uint64_t>(values[ids[i]]) > static_cast<std::uint64_t>(most)) {
                dropped.push_back(ids[i]);
            } else {
                *kept++ = ids[i];
            }
        }
        std::sort(dropped.begin(), dropped.end());
        return dropped;
    });
}

void read_lengths(const Lengths& lengths, const std::uint32_t* order, std::int64_t begin,
                  std::int64_t end, std::int64_t most, std::uint32_t* out) {
    constexpr std::int64_t ahead = 32;
    with_type(lengths, [&](const auto* values) {
        const auto length = [&](std::int64_t i) {
            return static_cast<std::uint32_t>(std::clamp<std::uint64_t>(
                static_cast<std::uint64_t>(values[i]), 1, static_cast<std::uint64_t>(most)));
        };
        if (order == nullptr) {
            std::generate_n(out, end - begin, [&, i = begin]() mutable { return length(i++); });
            return;
        }
        for (std::int64_t i = begin; i < end; ++i) {
            __builtin_prefetch(values + order[std::min(i + ahead, end - 1)]);
            *out++ = length(order[i]);
        }
    });
}

}  // namespace hermes
