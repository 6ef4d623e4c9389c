// The hot loops of loss.cpp, which includes this once for each instruction set.
//
// HERMES_TARGET, kVectorBytes: of vectors.hpp.

#include "vectors.hpp"

// `count` elements from `from` on; -inf behind them.
template <class Element>
HERMES_TARGET HERMES_INLINE Vector<float> some(const Element* from, std::int64_t count) {
    constexpr int width = kWidth<float>;
    if (count >= width) {
        return widened(from);
    }
    Element rest[width];
    std::fill_n(rest, width, minus_infinity<Element>());
    std::memcpy(rest, from, static_cast<std::size_t>(count) * sizeof(Element));
    return widened(rest);
}

template <class Element>
HERMES_TARGET HERMES_INLINE void round_some(Element* to, const Vector<float>& from,
                                            std::int64_t count) {
    constexpr int width = kWidth<float>;
    if (count >= width) {
        return round_into(to, from);
    }
    Element rest[width];
    round_into(rest, from);
    std::memcpy(to, rest, static_cast<std::size_t>(count) * sizeof(Element));
}

// Not NaN, unless nothing else is there.
template <class Element>
HERMES_TARGET float largest_of(const Element* row, std::int64_t size) {
    constexpr int width = kWidth<float>;
    Vector<float> tops[4];
    for (Vector<float>& top : tops) {
        top = Vector<float>{} - std::numeric_limits<float>::infinity();
    }
    std::int64_t i = 0;
    for (; i + 4 * width <= size; i += 4 * width) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const Vector<float> x = widened(row + i + j * width);
            tops[j] = x > tops[j] ? x : tops[j];
        }
    }
    for (; i < size; i += width) {
        const Vector<float> x = some(row + i, size - i);
        tops[0] = x > tops[0] ? x : tops[0];
    }
    float top = tops[0][0];
    for (const Vector<float>& x : tops) {
        for (int lane = 0; lane < width; ++lane) {
            top = std::max(top, x[lane]);
        }
    }
    return top;
}

// Sum of e ** (x - top), and of x * e ** (x - top) where that is wanted.
template <bool kExpects, class Element>
HERMES_TARGET Sums sums_under(const Element* row, std::int64_t size, float top) {
    constexpr int width = kWidth<float>;
    Sums sums{0, 0};
    for (std::int64_t begin = 0; begin < size; begin += kPiece) {
        const std::int64_t end = std::min(begin + kPiece, size);
        Vector<float> sum{}, product{};
#pragma GCC unroll 4
        for (std::int64_t i = begin; i < end; i += width) {
            const Vector<float> x = some(row + i, end - i);
            const Vector<float> e = exp_of(x - top);
            sum += e;
            if (kExpects) {
                product += e > 0 ? e * x : e;
            }
        }
        sums.weights += static_cast<double>(sum_of<float>(sum));
        sums.products += static_cast<double>(sum_of<float>(product));
    }
    return sums;
}

// p * (scale + tilt * log p), less `weight` at the target.
template <bool kTilts, class Element>
HERMES_TARGET void write_gradient(Element* row, std::int64_t size, std::int64_t column, float lse,
                                  float scale, float tilt, float weight) {
    constexpr int width = kWidth<float>;
    const auto gradient_of = [&](const Vector<float>& x) HERMES_TARGET {
        const Vector<float> log_p = x - lse;
        const Vector<float> p = exp_of(log_p > 88.0f ? Vector<float>{} + 88.0f : log_p);
        if (kTilts) {
            const Vector<float> factor = log_p * tilt + scale;
            return p > 0 ? p * factor : p;
        }
        return p * scale;
    };
    const bool here = 0 <= column && column < size;
    const Vector<float> at_target = gradient_of(some(row + (here ? column : 0), 1)) - weight;
#pragma GCC unroll 4
    for (std::int64_t i = 0; i < size; i += width) {
        round_some(row + i, gradient_of(some(row + i, size - i)), size - i);
    }
    if (here) {
        round_some(row + column, at_target, 1);
    }
}

template <class Element>
HERMES_TARGET float logit_at(const Element* row, std::int64_t size, std::int64_t column) {
    return 0 <= column && column < size ? some(row + column, 1)[0] : 0.0f;
}

// Log-sum-exp, and the expected logit where it is wanted.
template <bool kExpects, class Element>
HERMES_TARGET RowStatistics statistics_of(const Element* row, std::int64_t size) {
    const float top = largest_of(row, size);
    const Sums sums = sums_under<kExpects>(row, size, top);
    return {static_cast<float>(static_cast<double>(top) + std::log(sums.weights)),
            static_cast<float>(sums.products / sums.weights)};
}

template <class Element>
HERMES_TARGET void find_row(const Logits<Element>& all, std::int64_t r, float* lse, float* target,
                            float* expected) {
    const Element* row = all.values + r * all.stride;
    const RowStatistics found = statistics_of<true>(row, all.columns);
    lse[r] = found.lse;
    expected[r] = found.expected;
    target[r] = logit_at(row, all.columns, all.column[r]);
}

template <class Element>
HERMES_TARGET void differentiate_loss_row(const Logits<Element>& all, std::int64_t r,
                                          const float* weight, float z_loss, float* lse,
                                          float* target) {
    Element* row = all.values + r * all.stride;
    lse[r] = statistics_of<false>(row, all.columns).lse;
    target[r] = logit_at(row, all.columns, all.column[r]);
    const float scale = weight[r] * (1 + 2 * z_loss * lse[r]);
    write_gradient<false>(row, all.columns, all.column[r], lse[r], scale, 0.0f, weight[r]);
}

template <class Element>
HERMES_TARGET void differentiate_row(const Logits<Element>& all, std::int64_t r, const float* lse,
                                     const float* scale, const float* tilt, const float* weight) {
    Element* row = all.values + r * all.stride;
    if (tilt == nullptr) {
        write_gradient<false>(row, all.columns, all.column[r], lse[r], scale[r], 0.0f, weight[r]);
    } else {
        write_gradient<true>(row, all.columns, all.column[r], lse[r], scale[r], tilt[r], weight[r]);
    }
}
