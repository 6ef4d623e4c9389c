// As in attention.cpp: nothing here has to be equal on every platform (setup.py).
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#include "loss.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "isa.hpp"
#include "threads.hpp"

namespace hermes {
namespace {

constexpr std::int64_t kPiece = 1024;  // logits that are summed in fp32; pieces are in fp64
constexpr std::int64_t kLogitsOfOneThread = 1 << 17;  // 50 us, which outweigh starting a thread

struct Sums {
    double weights, products;
};

struct RowStatistics {
    float lse, expected;
};

template <class Element>
Element minus_infinity() {
    if constexpr (std::is_same_v<Element, Bfloat16>) {
        return {0xff80};
    } else if constexpr (std::is_same_v<Element, Float16>) {
        return {0xfc00};
    } else {
        return -std::numeric_limits<Element>::infinity();
    }
}

namespace scalar {
#define HERMES_TARGET
constexpr int kVectorBytes = 16;
#include "loss_rows.hpp"
#undef HERMES_TARGET
}  // namespace scalar

#if HERMES_X86_DISPATCH
namespace avx2 {
#define HERMES_TARGET HERMES_TARGET_AVX2
constexpr int kVectorBytes = 32;
#include "loss_rows.hpp"
#undef HERMES_TARGET
}  // namespace avx2

namespace avx512 {
#define HERMES_TARGET HERMES_TARGET_AVX512
constexpr int kVectorBytes = 64;
#include "loss_rows.hpp"
#undef HERMES_TARGET
}  // namespace avx512
#endif

// Calls work(r) for every row, from as many threads as are worth starting.
template <class Element, class Work>
void for_rows(const Logits<Element>& logits, const Work& work) {
    const std::int64_t worth = logits.rows * logits.columns / kLogitsOfOneThread;
    const std::int64_t most = std::max<std::int64_t>(std::min(logits.threads, logits.rows), 1);
    const std::int64_t threads = std::clamp<std::int64_t>(worth, 1, most);
    in_threads(threads, [&](std::int64_t thread) {
        const std::int64_t end = logits.rows * (thread + 1) / threads;
        for (std::int64_t r = logits.rows * thread / threads; r < end; ++r) {
            work(r);
        }
    });
}

}  // namespace

template <class Element>
void find_statistics(const Logits<Element>& logits, float* lse, float* target, float* expected) {
    for_rows(logits, [&](std::int64_t r) {
        switch (active_isa()) {
#if HERMES_X86_DISPATCH
            case Isa::avx512: return avx512::find_row(logits, r, lse, target, expected);
            case Isa::avx2: return avx2::find_row(logits, r, lse, target, expected);
#endif
            default: return scalar::find_row(logits, r, lse, target, expected);
        }
    });
}

template <class Element>
void differentiate_loss(const Logits<Element>& logits, const float* weight, float z_loss,
                        float* lse, float* target) {
    for_rows(logits, [&](std::int64_t r) {
        switch (active_isa()) {
#if HERMES_X86_DISPATCH
            case Isa::avx512:
                return avx512::differentiate_loss_row(logits, r, weight, z_loss, lse, target);
            case Isa::avx2:
                return avx2::differentiate_loss_row(logits, r, weight, z_loss, lse, target);
#endif
            default: return scalar::differentiate_loss_row(logits, r, weight, z_loss, lse, target);
        }
    });
}

template <class Element>
void differentiate_rows(const Logits<Element>& logits, const float* lse, const float* scale,
                        const float* tilt, const float* weight) {
    for_rows(logits, [&](std::int64_t r) {
        switch (active_isa()) {
#if HERMES_X86_DISPATCH
            case Isa::avx512: return avx512::differentiate_row(logits, r, lse, scale, tilt, weight);
            case Isa::avx2: return avx2::differentiate_row(logits, r, lse, scale, tilt, weight);
#endif
            default: return scalar::differentiate_row(logits, r, lse, scale, tilt, weight);
        }
    });
}

#define HERMES_INSTANTIATE(Element)                                                                \
    template void find_statistics(const Logits<Element>&, float*, float*, float*);                 \
    template void differentiate_loss(const Logits<Element>&, const float*, float, float*, float*); \
    template void differentiate_rows(const Logits<Element>&, const float*, const float*,           \
                                     const float*, const float*);
HERMES_INSTANTIATE(float)
HERMES_INSTANTIATE(Bfloat16)
HERMES_INSTANTIATE(Float16)
#undef HERMES_INSTANTIATE

}  // namespace hermes
