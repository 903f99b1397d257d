// Divergences by name: for the files that check arguments, not for kernels (see csrc/cpu/isa.h for why).
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "divergence.h"

namespace pyfast {

inline std::optional<Divergence> find_divergence(std::string_view name) {
  for (int i = 0; i < kDivergenceCount; ++i)
    if (name == kDivergenceNames[i]) return static_cast<Divergence>(i);
  return std::nullopt;
}

// All of them, for messages.
inline std::string divergence_names() {
  std::string names = kDivergenceNames[0];
  for (int i = 1; i < kDivergenceCount; ++i) names += std::string(", ") + kDivergenceNames[i];
  return names;
}

}  // namespace pyfast
