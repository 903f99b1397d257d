// nm_mask for vectors of Vec::width floats. The including file defines, for its ISA,
//
//   Order            lane numbers and table indices, one int a lane
//   lanes_from(p)    an Order from int32 [width]
//   rotated(v, o)    lane i of the result is lane o[i] of v
//   Ties             in which lanes an equal score ranks before the lane's own
//   ties_from(p)     a Ties from int32 [width], all ones or 0
//   Rank             a counter a lane; Rank{} is 0
//   count(r, other, own, ties)   one more in the lanes where `other` ranks before `own`: larger, or equal and in `ties`
//   kept(r, n)       which lanes counted fewer than n, in the form that store_kept takes
//   store_kept(p, kept, lanes)   a byte, 0 or 1, for each of the first `lanes` lanes
#pragma once

#include "nm_mask.h"

namespace pyfast {
namespace {

// Loads `lanes` scores; -inf for NaN and in the lanes beyond, which therefore rank last.
template <class T>
inline Vec load_scores(const T* p, int64_t lanes) {
  const Vec loaded = lanes == Vec::width ? load(p) : load_partial(p, lanes, -__builtin_inff());
  return max(loaded, broadcast(-__builtin_inff()));  // the second where the first is NaN
}

// Groups that fit into a register, width / m of them side by side:
//
//   m = 4, rotation 1     own    a0 a1 a2 a3 b0 b1 b2 b3 …
//                         other  a1 a2 a3 a0 b1 b2 b3 b0 …
//                         ties    -  -  -  x  -  -  -  x    the other one stands in a lower column
template <class T, int kGroup>
void nm_mask_packed(const NmMaskArgs& args, int64_t begin, int64_t end) {
  const int m = kGroup != 0 ? kGroup : static_cast<int>(args.m);
  const int step = Vec::width / m * m;
  Order order[kGroup != 0 ? kGroup : Vec::width];  // of a known group: registers
  Ties ties[kGroup != 0 ? kGroup : Vec::width];
  for (int rotation = 1; rotation < m; ++rotation) {
    int32_t source[Vec::width], tied[Vec::width];
    for (int lane = 0; lane < Vec::width; ++lane) {
      const int own = lane % m, other = (own + rotation) % m;
      source[lane] = lane < step ? lane - own + other : lane;
      tied[lane] = lane < step && other < own ? -1 : 0;
    }
    order[rotation] = lanes_from(source);
    ties[rotation] = ties_from(tied);
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* scores = static_cast<const T*>(args.scores) + row * args.score_stride;
    uint8_t* mask = args.mask + row * args.k;
    for (int64_t column = 0; column < args.k; column += step) {
      const int64_t left = args.k - column;
      const Vec own = load_scores(scores + column, left < Vec::width ? left : Vec::width);
      Rank rank{};
      for (int rotation = 1; rotation < m; ++rotation) count(rank, rotated(own, order[rotation]), own, ties[rotation]);
      store_kept(mask + column, kept(rank, static_cast<int>(args.n)), left < step ? left : step);
    }
  }
}

// Groups wider than a register: `parts` registers hold one, and each of its elements is compared with all of them.
template <class T>
void nm_mask_wide(const NmMaskArgs& args, int64_t begin, int64_t end) {
  constexpr int kParts = static_cast<int>(kNmMaskMaxGroup) / Vec::width;
  const int m = static_cast<int>(args.m);
  const int parts = (m + Vec::width - 1) / Vec::width;
  // ties: lane i of part p is set for element j where j < p * width + i, that is the window that starts at j's place
  int32_t after[3 * kNmMaskMaxGroup];
  for (int i = 0; i < 3 * kNmMaskMaxGroup; ++i) after[i] = i > kNmMaskMaxGroup ? -1 : 0;
  for (int64_t row = begin; row < end; ++row) {
    const T* scores = static_cast<const T*>(args.scores) + row * args.score_stride;
    uint8_t* mask = args.mask + row * args.k;
    for (int64_t column = 0; column < args.k; column += m) {
      const int length = static_cast<int>(args.k - column < m ? args.k - column : m);
      Vec own[kParts];
      Rank rank[kParts]{};
      alignas(64) float group[kNmMaskMaxGroup];
      for (int part = 0; part < parts; ++part) {
        const int inside = length - part * Vec::width;
        const int lanes = inside < 0 ? 0 : inside < Vec::width ? inside : Vec::width;
        own[part] = load_scores(scores + column + part * Vec::width, lanes);
        store(group + part * Vec::width, own[part]);
      }
      for (int j = 0; j < length; ++j) {
        const Vec other = broadcast(group[j]);
        for (int part = 0; part < parts; ++part)
          count(rank[part], other, own[part], ties_from(after + kNmMaskMaxGroup - j + part * Vec::width));
      }
      for (int part = 0; part * Vec::width < length; ++part) {
        const int inside = length - part * Vec::width;
        store_kept(mask + column + part * Vec::width, kept(rank[part], static_cast<int>(args.n)),
                   inside < Vec::width ? inside : Vec::width);
      }
    }
  }
}

template <class T>
void nm_mask(const NmMaskArgs& args, int64_t begin, int64_t end) {
  if (args.m == 4)
    nm_mask_packed<T, 4>(args, begin, end);
  else if (args.m <= Vec::width)
    nm_mask_packed<T, 0>(args, begin, end);
  else
    nm_mask_wide<T>(args, begin, end);
}

}  // namespace
}  // namespace pyfast
