#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pyfast {
namespace {

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

int parse(const char* source, const char* name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kIsaNames[i]) == 0) {
      if (!isa_supported(static_cast<Isa>(i)))
        throw std::invalid_argument(std::string(source) + ": this processor cannot run '" + name + "'");
      return i;
    }
  }
  throw std::invalid_argument(std::string(source) + ": got '" + name + "', accepted: serial, avx2, avx512");
}

int choose() {
  if (const char* name = std::getenv("PYFAST_ISA"); name != nullptr && *name != '\0') return parse("PYFAST_ISA", name);
  for (int i = kIsaCount - 1; i > 0; --i)
    if (isa_supported(static_cast<Isa>(i))) return i;
  return static_cast<int>(Isa::serial);
}

}  // namespace

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  switch (isa) {
    case Isa::serial:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::serial;
#endif
}

Isa active_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    isa = choose();  // racing threads compute the same answer
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_active_isa(const char* name) { chosen.store(parse("isa", name), std::memory_order_relaxed); }

bool has_vbmi2() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return isa_supported(Isa::avx512) && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  return has_vbmi2() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace pyfast
