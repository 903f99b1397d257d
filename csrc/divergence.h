// The divergences of distill_kl, in the order of every table of kernels.
#pragma once

namespace pyfast {

enum class Divergence { forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd, mse };

inline constexpr int kDivergenceCount = 7;
inline constexpr const char* kDivergenceNames[kDivergenceCount] = {"forward_kl",      "reverse_kl", "jsd", "skew_kl",
                                                                   "skew_reverse_kl", "tvd",        "mse"};

}  // namespace pyfast
