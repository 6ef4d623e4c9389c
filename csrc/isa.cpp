#include "isa.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if HERMES_X86_DISPATCH
#include <cpuid.h>
#endif

namespace hermes {
namespace {

Isa best_of_this_cpu() {
#if HERMES_X86_DISPATCH
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return Isa::avx2;
    }
#endif
    return Isa::scalar;
}

Isa choose() {
    const Isa best = best_of_this_cpu();
    const char* wanted = std::getenv("HERMES_CORE_ISA");
    if (wanted == nullptr || *wanted == '\0') {
        return best;
    }
    for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
        if (isa_name(isa) == wanted) {
            return isa < best ? isa : best;
        }
    }
    throw std::invalid_argument("HERMES_CORE_ISA is '" + std::string(wanted) +
                                "'; want scalar, avx2 or avx512");
}

}  // namespace

Isa active_isa() {
    static const Isa isa = choose();
    return isa;
}

Cpu this_cpu() {
#if HERMES_X86_DISPATCH
    __builtin_cpu_init();
    Cpu cpu{__builtin_cpu_is("intel") != 0, false, false};
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // by their bits: older compilers lack the names
    if (__builtin_cpu_supports("avx512f")) {
        cpu.multiplies_fp16 =
            __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 23 & 1) != 0;
        cpu.multiplies_bf16 =
            __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
    }
    return cpu;
#else
    return {false, true, true};
#endif
}

std::string_view isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::scalar: break;
    }
    return "scalar";
}

}  // namespace hermes
