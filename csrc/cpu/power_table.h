// Powers of two from a table: what ranged_exp2.h takes of an ISA's vec_*.h, and the constants that those share.
//
//   n = z rate − shift, rounded to steps of 1 / 2^bits by adding a large number whose last bits then count the steps:
//
//     float(z rate + origin)   | kMagic                    | 7 bits: floor(n) + kLeast | bits: i |
//     << (23 − bits)           | 9 bits: floor(n) + kLeast | i | 0 …                             |
//     + table[i]               | the float 2^(i / 2^bits) · 2^floor(n) · factor                  |
//
// The bits that are kMagic's tell that n lies in [−kLeast, 128 − kLeast): only there is the result right.
#pragma once

#include <cstdint>

#include "scalars.h"

namespace pyfast {
namespace {

constexpr int kLeast = 112;

// Bits of factor · 2^(i / 2^bits), less what the shifted sum brings besides the exponent.
template <int bits>
struct PowerTable {
  alignas(64) uint32_t entry[1 << bits];

  constexpr explicit PowerTable(double factor) : entry{} {
    for (uint32_t i = 0; i < 1u << bits; ++i)
      entry[i] = to_bits(static_cast<float>(factor * __builtin_exp2(i / static_cast<double>(1 << bits)))) -
                 (i << (23 - bits)) - (static_cast<uint32_t>(kLeast) << 23);
  }
};

// 3 · 2^(22 − bits), whose last place is 1 / 2^bits.
template <int bits>
constexpr float kMagic = 1.5f * (1 << (23 - bits));

// Those bits of a sum that say where it lies.
template <int bits>
constexpr uint32_t kPlace = ~((128u << bits) - 1);

// 2^f for |f| <= 1/64 as kFactor ((f + kCenter)² + kSquare): one multiply-add and, with the factor in the table, one
// product (minimax, relative error below 1.3e-7). kCenter is a step of 1/32, so that it can be a part of what f is
// computed from; the best one, 1.4427, would halve the error.
constexpr float kCenter = 1.4375f;
constexpr float kSquare = 2.0812600f;
constexpr double kFactor = 0.24109941869029033;
constexpr PowerTable<5> kPowers32{kFactor};

}  // namespace
}  // namespace pyfast
