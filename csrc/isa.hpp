// Which vector instructions this process may use.
//
// One binary serves every x86-64 CPU: a hot loop is compiled once for each level below, and the
// best level is picked on first use. HERMES_CORE_ISA=scalar|avx2|avx512 lowers the choice (never
// raises it), so that tests can run every path on one machine.
#pragma once

#include <string_view>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HERMES_X86_DISPATCH 1
// prfchw is a hint, which a CPU that has AVX2 and not this takes for no operation.
#define HERMES_TARGET_AVX2 __attribute__((target("avx2,fma,prfchw")))
#define HERMES_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define HERMES_INLINE __attribute__((always_inline)) inline
#else
#define HERMES_X86_DISPATCH 0
#define HERMES_TARGET_AVX2
#define HERMES_TARGET_AVX512
#define HERMES_INLINE inline
#endif

namespace hermes {

enum class Isa { scalar, avx2, avx512 };

Isa active_isa();                    // chosen on first call, then fixed
std::string_view isa_name(Isa isa);  // "scalar", "avx2", "avx512"

// What decides between libraries' matrix products. Not known off x86-64, where halves pass for
// multiplied.
struct Cpu {
    bool is_intel;
    bool multiplies_bf16, multiplies_fp16;  // by instructions of their own
};
Cpu this_cpu();

}  // namespace hermes
