// Causal attention inside segments on a CPU, forward and backward.
//
// T packed tokens, N query heads, K key heads, H head size, U >= T room of a line of log-sum-exps.
#pragma once

#include <cstdint>

namespace hermes {

struct Bfloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

// What an element is computed, summed and kept in between with.
template <class Element>
struct RealOf {
    using type = float;
};
template <>
struct RealOf<double> {
    using type = double;
};
template <class Element>
using Real = typename RealOf<Element>::type;

struct AttentionShape {
    std::int64_t tokens, heads, key_heads, size;
    std::int64_t lse_stride;     // U
    const std::int32_t* starts;  // [T], where each token's segment starts
    double scale;
    std::int64_t threads;  // at most; they change no bit
};

template <class Element>
struct AttentionForward {
    const Element *q, *k, *v;  // [T, N, H], [T, K, H], [T, K, H]
    Element* out;              // [T, N, H]
    Real<Element>* lse;        // [N, U]; natural logarithm
};

template <class Element>
struct AttentionBackward {
    const Element *grad, *q, *k, *v, *out;  // [T, N, H]; [T, K, H]
    const Real<Element>* lse;               // [N, U]
    Element *dq, *dk, *dv;
};

// Both throw std::invalid_argument where `starts` are no segments, std::bad_alloc.
template <class Element>
void attend(const AttentionShape& shape, const AttentionForward<Element>& arrays);
template <class Element>
void differentiate_attention(const AttentionShape& shape, const AttentionBackward<Element>& arrays);

}  // namespace hermes
