// Which instruction set the CPU kernels use: what this binary holds, what this processor can run, and
// what the user asked for. Every op keeps one table of function pointers an ISA and reads it through
// active_isa(), so that the choice is made once, at run time, and can be seen and overridden.
#pragma once

namespace pyfast {

enum class Isa { serial = 0, avx2 = 1, avx512 = 2 };

inline constexpr int kIsaCount = 3;
inline constexpr const char* kIsaNames[kIsaCount] = {"serial", "avx2", "avx512"};

// True where the processor and the operating system can run code of this ISA. avx512 means
// F + BW + DQ + VL (Skylake-X and later, Zen 4 and later); avx2 means AVX2 + FMA + F16C + BMI2.
bool isa_supported(Isa isa);

// The ISA in use: PYFAST_ISA where it is set, else the best one supported. Reads the environment once.
// Throws std::invalid_argument where PYFAST_ISA names nothing known or nothing this processor can run.
Isa active_isa();

// Replaces the ISA in use for the whole process. Throws std::invalid_argument like active_isa().
void set_active_isa(const char* name);

// True where AVX-512 has VBMI and VBMI2 too (Ice Lake and later, Zen 4 and later).
bool has_vbmi2();

// True where it has BF16 besides these two (Sapphire Rapids and later, Zen 4 and later).
bool has_avx512_bf16();

// True on Intel's processors: MKL's kernels for AVX-512 run on no others.
bool is_intel();

}  // namespace pyfast
