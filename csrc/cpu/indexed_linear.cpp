// indexed_linear on the CPU: checks, threads, activations transposed, sums turned back, registration. The contract is
// in indexed_linear.h.
#include "indexed_linear.h"

#include "sparse_driver.h"
#include "transpose.h"

namespace pyfast {
namespace {

// x [count, k] of any of the three dtypes to out [k_padded, tile] float32; zeros beyond count and k.
template <class T>
void transpose_activations(const T* x, int64_t stride, int64_t count, int64_t k, int tile, float* out, int64_t begin,
                           int64_t end) {
  for (int64_t c = begin; c < end; c += 4) {
    int64_t t = 0;
    if (c + 4 <= k && c + 4 <= end)
      for (; t + 4 <= count; t += 4) transpose4(x + t * stride + c, stride, out + c * tile + t, tile);
    for (; t < tile; ++t)
      for (int64_t i = c; i < c + 4 && i < end; ++i)
        out[i * tile + t] = t < count && i < k ? widen(x[t * stride + i]) : 0.0f;
  }
}

// The smallest tile that holds the tokens, or the widest.
int tile_for(int64_t tokens) {
  int i = 0;
  while (i + 1 < kTokenTileCount && kTokenTiles[i] < tokens) ++i;
  return i;
}

// Sums of a panel [rows, tile] to the outputs of `count` tokens from `token` on, by way of `turned` [count, rows]:
// turned into y itself they would be scattered over it, four at a time.
void write_panel(const Epilogue& e, const float* sums, float* turned, int64_t first_row, int64_t rows, int tile,
                 int64_t token, int64_t count) {
  for (int64_t r = 0; r < rows; r += 4) {
    const int64_t height = std::min<int64_t>(4, rows - r);
    int64_t t = 0;
    if (height == 4)
      for (; t + 4 <= count; t += 4) transpose4(sums + r * tile + t, tile, turned + t * rows + r, rows);
    for (; t < count; ++t)
      for (int64_t i = r; i < r + height; ++i) turned[t * rows + i] = sums[i * tile + t];
  }
  const EpilogueKernel kernel = epilogue_table(active_isa()).from_float[static_cast<int>(e.dtype)];
  for (int64_t t = 0; t < count; ++t) kernel(e, turned + t * rows, first_row, token + t, rows);
}

Tensor indexed_linear(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& starts,
                      const std::optional<Tensor>& bias, int64_t n, int64_t panel, int64_t block, int64_t activation,
                      const std::optional<Tensor>& mul) {
  const LinearOptions options{std::nullopt, bias, activation, mul};
  check_linear(x, static_cast<Stored>(dtype_of(x, "x")), n, options);
  STD_TORCH_CHECK(panel > 0 && block > 0 && block <= 256, "panel, block: accepted: above 0, block at most 256");
  const int64_t tokens = x.size(0), k = x.size(1);
  IndexedLinearArgs args{};
  args.blocks = (k + block - 1) / block;
  const int64_t panels = (n + panel - 1) / panel;
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 1 && values.is_contiguous(),
                  "values: must be contiguous float32 [entries]");
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Byte && columns.dim() == 1 && columns.is_contiguous() &&
                      columns.size(0) == values.size(0),
                  "columns: must be contiguous uint8 [entries]");
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Int && starts.dim() == 1 && starts.is_contiguous() &&
                      starts.size(0) == panels * args.blocks * panel + 1,
                  "starts: must be contiguous int32 [panels * blocks * panel + 1]");
  args.values = values.const_data_ptr<float>();
  args.columns = columns.const_data_ptr<uint8_t>();
  args.starts = starts.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(int64_t{kIndexedUnit} * args.starts[starts.size(0) - 1] == values.size(0),
                  "values: must have as many elements as starts say");
  args.n = n;
  args.k = k;
  args.panel = panel;
  args.block = block;
  LinearOutput output(x, n, options);
  if (tokens == 0 || n == 0) return output.y;

  const Tensor rows = rows_contiguous(x);
  const int which = tile_for(tokens), tile = kTokenTiles[which];
  const int64_t tiles = (tokens + tile - 1) / tile, height = args.blocks * block;
  Tensor turned = torch::stable::new_empty(x, {tiles * height, tile}, ScalarType::Float);
  Tensor scratch = torch::stable::new_empty(x, {2 * max_workers() * panel, tile}, ScalarType::Float);
  float* xt = turned.mutable_data_ptr<float>();
  const auto turn = [&](const auto* from) {
    constexpr int64_t kSlice = 256;  // columns
    const int64_t slices = (height + kSlice - 1) / kSlice;
    parallel_chunks(tiles * slices, 1 + 32768 / (kSlice * tile), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / slices, c = i % slices * kSlice;
        transpose_activations(from + t * tile * rows.stride(0), rows.stride(0),
                              std::min<int64_t>(tile, tokens - t * tile), k, tile, xt + t * height * tile, c,
                              std::min(c + kSlice, height));
      }
    });
  };
  switch (dtype_of(x, "x")) {
    case Dtype::f32:
      turn(static_cast<const float*>(rows.const_data_ptr()));
      break;
    case Dtype::bf16:
      turn(static_cast<const bf16*>(rows.const_data_ptr()));
      break;
    case Dtype::f16:
      turn(static_cast<const f16*>(rows.const_data_ptr()));
      break;
  }

  const IndexedLinearKernel kernel = indexed_linear_table(active_isa()).panel[which];
  float* sums = scratch.mutable_data_ptr<float>();
  // Panels, not rows, are handed out, each to whoever is free: a panel full of values costs one thread no more than its
  // own time. Registers are filled whether or not their tokens are there: about 30 products a nanosecond; or 2 of a
  // single token.
  const int64_t work = values.size(0) / panels * tiles * std::max(tile, 16);
  parallel_workers(panels, 1 + 262144 / (work + 1), [&](int64_t begin, int64_t end, int64_t worker) {
    float* own = sums + 2 * worker * panel * tile;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first_row = p * panel, count = std::min(panel, n - first_row);
      for (int64_t t = 0; t < tiles; ++t) {
        kernel(args, p, xt + t * height * tile, own);
        write_panel(output.epilogue, own, own + panel * tile, first_row, count, tile, t * tile,
                    std::min<int64_t>(tile, tokens - t * tile));
      }
    }
  });
  return output.y;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("indexed_linear", TORCH_BOX(&pyfast::indexed_linear)); }
