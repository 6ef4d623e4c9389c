// Softmax statistics and gradients of rows of logits on a CPU, each row while it lies in cache.
#pragma once

#include <cstdint>

#include "attention.hpp"

namespace hermes {

template <class Element>
struct Logits {
    Element* values;  // [rows, columns], a row begins every `stride` elements
    std::int64_t rows, columns, stride;
    const std::int64_t* column;  // [rows], of the target; -1 where it is elsewhere
    std::int64_t threads;        // at most; they change no bit
};

// Log-sum-exp, target logit (0 where it is elsewhere) and expected logit, [rows] each.
template <class Element>
void find_statistics(const Logits<Element>& logits, float* lse, float* target, float* expected);

// Logits become the gradient of weight * (lse - target + z_loss * lse ** 2).
template <class Element>
void differentiate_loss(const Logits<Element>& logits, const float* weight, float z_loss,
                        float* lse, float* target);

// Logits become p * (scale + tilt * log p) - weight * [target]; no tilt is nullptr.
template <class Element>
void differentiate_rows(const Logits<Element>& logits, const float* lse, const float* scale,
                        const float* tilt, const float* weight);

}  // namespace hermes
