// What the lanes of a warp do together: shuffles, votes, ldmatrix, mma and mma.sp, in the fragment layouts of the PTX
// ISA.
#include <cstring>

#include "../cpu/scalars.h"
#include "engine.h"

namespace simt {
namespace {

struct Shuffled {
  uint32_t value;
  int lane;
  uint32_t result;
};

int source_of(Shuffle mode, int own, int lane) {
  switch (mode) {
    case Shuffle::index:
      return lane & 31;
    case Shuffle::up:
      return own < lane ? own : own - lane;
    case Shuffle::down:
      return own + lane > 31 ? own : own + lane;
    default:
      return (own ^ lane) & 31;
  }
}

template <Shuffle Mode>
void perform_shuffle(const Meeting& meeting) {
  for (int own = 0; own < 32; ++own) {
    if ((meeting.mask >> own & 1u) == 0) continue;
    Shuffled& mine = *static_cast<Shuffled*>(meeting.arguments[own]);
    const int from = source_of(Mode, own, mine.lane);
    if ((meeting.mask >> from & 1u) == 0)
      fail(meeting.where, format("shuffle: lane %d takes the value of lane %d, which is not in the mask", own, from));
    mine.result = static_cast<const Shuffled*>(meeting.arguments[from])->value;
  }
}

struct Voted {
  bool predicate;
  uint32_t result;
};

void perform_vote(const Meeting& meeting) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (meeting.mask >> lane & 1u)
      ballot |= static_cast<uint32_t>(static_cast<Voted*>(meeting.arguments[lane])->predicate) << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (meeting.mask >> lane & 1u) static_cast<Voted*>(meeting.arguments[lane])->result = ballot;
}

struct Matrices {
  uint32_t* words;
  int count;
  bool transposed;
  const void* row;
};

void perform_load(const Meeting& meeting) {
  Lane* const caller = engine.lane;
  const auto of = [&](int lane) -> Matrices& { return *static_cast<Matrices*>(meeting.arguments[lane]); };
  for (int i = 0; i < of(0).count; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      engine.lane = caller->warp->lanes[static_cast<size_t>(lane)];  // the one that receives reads
      const int g = lane / 4, t = lane % 4;
      uint16_t pair[2];
      for (int half = 0; half < 2; ++half) {
        const int row = of(0).transposed ? 2 * t + half : g, column = of(0).transposed ? g : 2 * t + half;
        const uintptr_t begin = reinterpret_cast<uintptr_t>(of(8 * i + row).row);
        if (begin % 16 != 0)
          fail(meeting.where, format("ldmatrix: row %d of matrix %d is not at a multiple of 16 bytes", row, i));
        const uintptr_t from = begin + 2 * static_cast<uintptr_t>(column);
        touch(from, 2, Use::read, true, meeting.where);
        std::memcpy(&pair[half], reinterpret_cast<const void*>(from), 2);
      }
      of(lane).words[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
  engine.lane = caller;
}

struct Product {
  bool bfloat16;
  int selector;  // -1: dense
  float* d;
  const uint32_t *a, *b;
  const float* c;
  uint32_t metadata;
};

float element(bool bfloat16, uint32_t word, int half) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * half);
  return bfloat16 ? pyfast::widen(pyfast::bf16{bits}) : pyfast::widen(pyfast::f16{bits});
}

// Column of b's row that kept value `column` (0–15) of row `row` multiplies.
int kept_row(const Meeting& meeting, int row, int column) {
  const int group = column / 2;
  const auto& first = *static_cast<const Product*>(meeting.arguments[0]);
  const int lane = row % 8 * 4 + 2 * first.selector + group / 4;
  const uint32_t half = static_cast<const Product*>(meeting.arguments[lane])->metadata >> 16 * (row / 8);
  const uint32_t nibble = half >> 4 * (group % 4) & 15u;
  if ((nibble & 3u) >= nibble >> 2)
    fail(meeting.where, format("mma_sp: nibble %x of group %d of row %d (lane %d) is none of 4, 8, 9, C, D, E", nibble,
                               group, row, lane));
  return 4 * group + static_cast<int>(column % 2 == 0 ? nibble & 3u : nibble >> 2);
}

void perform_product(const Meeting& meeting) {
  const auto of = [&](int lane) -> const Product& { return *static_cast<const Product*>(meeting.arguments[lane]); };
  const bool bfloat16 = of(0).bfloat16;
  float out[32][4];
  for (int row = 0; row < 16; ++row) {
    int place[16];
    float kept[16];
    for (int column = 0; column < 16; ++column) {
      const int lane = row % 8 * 4 + column % 8 / 2;
      kept[column] = element(bfloat16, of(lane).a[row / 8 + column / 8 * 2], column % 2);
      place[column] = of(0).selector < 0 ? column : kept_row(meeting, row, column);
    }
    for (int column = 0; column < 8; ++column) {
      const int lane = row % 8 * 4 + column / 2, at = row / 8 * 2 + column % 2;
      float sum = of(lane).c[at];
      for (int i = 0; i < 16; ++i) {
        const int holder = column * 4 + place[i] % 8 / 2;
        sum += kept[i] * element(bfloat16, of(holder).b[place[i] / 8], place[i] % 2);
      }
      out[lane][at] = sum;
    }
  }
  for (int lane = 0; lane < 32; ++lane) std::memcpy(of(lane).d, out[lane], sizeof(out[lane]));
}

}  // namespace

uint32_t shuffle(Shuffle mode, uint32_t value, int lane, uint32_t mask, Where where) {
  Shuffled argument{value, lane, 0};
  switch (mode) {
    case Shuffle::index:
      meet("shfl", mask, &argument, perform_shuffle<Shuffle::index>, where);
      break;
    case Shuffle::up:
      meet("shfl_up", mask, &argument, perform_shuffle<Shuffle::up>, where);
      break;
    case Shuffle::down:
      meet("shfl_down", mask, &argument, perform_shuffle<Shuffle::down>, where);
      break;
    case Shuffle::exclusive_or:
      meet("shfl_xor", mask, &argument, perform_shuffle<Shuffle::exclusive_or>, where);
      break;
  }
  return argument.result;
}

uint32_t vote(bool predicate, uint32_t mask, Where where) {
  Voted argument{predicate, 0};
  meet("vote", mask, &argument, perform_vote, where);
  return argument.result;
}

void load_matrices(uint32_t* words, int count, bool transposed, const void* row, Where where) {
  Matrices argument{words, count, transposed, row};
  meet("ldmatrix", 0xffffffffu, &argument, perform_load, where);
}

void multiply(bool bfloat16, float* d, const uint32_t* a, const uint32_t* b, const float* c, Where where) {
  Product argument{bfloat16, -1, d, a, b, c, 0};
  meet("mma", 0xffffffffu, &argument, perform_product, where);
}

void multiply_sparse(bool bfloat16, int selector, float* d, const uint32_t* a, const uint32_t* b, const float* c,
                     uint32_t metadata, Where where) {
  Product argument{bfloat16, selector, d, a, b, c, metadata};
  meet("mma_sp", 0xffffffffu, &argument, perform_product, where);
}

}  // namespace simt
