// The kernels of csrc/cuda/sliced_linear.cuh on the host, launched as in sliced_linear.cu.
#include "simt.h"

#include "sliced_linear.cuh"

using namespace pyfast::cuda;

namespace {

template <class T, int Tokens, int Bits>
void launch(SlicedLinearArgs args, unsigned blocks) {
  using Plan = SlicedLinearPlan<Tokens, Bits>;
  args.partial = static_cast<float*>(simt::scratch(blocks * 2 * Plan::kSlotFloats * sizeof(float)));
  simt::launch({{blocks}, {Plan::kThreads}, 1, static_cast<size_t>(Plan::shared_bytes(args.columns))},
               sliced_linear_kernel<T, Tokens, Bits>, args);
}

template <class T, int Bits>
void choose(const SlicedLinearArgs& args, unsigned blocks) {
  if (args.tokens == 1)
    launch<T, 1, Bits>(args, blocks);
  else if (args.tokens == 2)
    launch<T, 2, Bits>(args, blocks);
  else if (args.tokens <= 4)
    launch<T, 4, Bits>(args, blocks);
  else
    launch<T, 8, Bits>(args, blocks);
}

template <class T>
void choose_bits(const SlicedLinearArgs& args, unsigned blocks, int64_t bits) {
  if (bits == 4) {
    choose<T, 4>(args, blocks);
  } else {
    choose<T, 8>(args, blocks);
  }
}

}  // namespace

SIMT_EXPORT sliced_linear(const uint16_t* x, const uint16_t* values, const uint8_t* deltas, const uint16_t* starts,
                          const int32_t* segments, const int32_t* ends, const int32_t* rows, const uint16_t* bias,
                          const uint16_t* mul, uint16_t* y, uint32_t* counters, int64_t tokens, int64_t n,
                          int64_t columns, int64_t chunks, int64_t blocks, int64_t bits, int64_t activation,
                          int64_t bfloat16) {
  SlicedLinearArgs args{};
  args.values = values, args.deltas = deltas, args.starts = starts;
  args.segments = segments, args.ends = ends, args.rows = rows;
  args.x = x, args.x_stride = columns;
  args.tokens = static_cast<int32_t>(tokens), args.columns = static_cast<int32_t>(columns);
  args.block_chunks = static_cast<int32_t>(chunks / blocks), args.longer = static_cast<int32_t>(chunks % blocks);
  args.counters = counters;
  args.out = {bias, mul, y, n, static_cast<Activation>(activation)};
  if (bfloat16) {
    choose_bits<BFloat16>(args, static_cast<unsigned>(blocks), bits);
  } else {
    choose_bits<Float16>(args, static_cast<unsigned>(blocks), bits);
  }
}

// Shared memory of a launch for so many columns, of 1, 2, 4 and 8 tokens.
SIMT_EXPORT sliced_shared_bytes(int32_t* bytes, int64_t columns) {
  const int k = static_cast<int>(columns);
  bytes[0] = SlicedLinearPlan<1, 4>::shared_bytes(k);
  bytes[1] = SlicedLinearPlan<2, 4>::shared_bytes(k);
  bytes[2] = SlicedLinearPlan<4, 4>::shared_bytes(k);
  bytes[3] = SlicedLinearPlan<8, 4>::shared_bytes(k);
}
