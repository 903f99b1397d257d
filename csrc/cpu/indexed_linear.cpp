// indexed_linear on the CPU: checks, threads, activations transposed, sums turned back, registration. The contract is
// in indexed_linear.h.
#include "indexed_linear.h"

#include <vector>

#include "sparse_driver.h"
#include "transpose.h"

namespace pyfast {
namespace {

// Columns [begin, end) of x [count, k], of any of the three dtypes, to out [block + 1, tile] float32; zeros beyond
// count, behind the columns, and in the last row.
template <class T>
void transpose_block(const T* x, int64_t stride, int64_t count, int64_t begin, int64_t end, int64_t block, int tile,
                     float* out) {
  const int64_t columns = end - begin;
  for (int64_t c = 0; c < columns; c += 4) {
    const int64_t width = std::min<int64_t>(4, columns - c);
    int64_t t = 0;
    if (width == 4)
      for (; t + 4 <= count; t += 4) transpose4(x + t * stride + begin + c, stride, out + c * tile + t, tile);
    for (; t < tile; ++t)
      for (int64_t i = c; i < c + width; ++i) out[i * tile + t] = t < count ? widen(x[t * stride + begin + i]) : 0.0f;
  }
  std::fill(out + columns * tile, out + (block + 1) * tile, 0.0f);
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

// Tokens that go through the kernel together: as many as the widest tile holds, the last ones in the narrowest tile that
// holds them.
struct Tile {
  int which;  // in kTokenTiles
  int64_t token, count;
  float* x;  // [blocks · (block + 1), width]

  int width() const { return kTokenTiles[which]; }
};

std::vector<Tile> cut_tokens(int64_t tokens, int64_t height, float* x) {
  constexpr int64_t kWidest = kTokenTiles[kTokenTileCount - 1];
  std::vector<Tile> tiles;
  for (int64_t token = 0; token < tokens; token += kWidest) {
    const int64_t count = std::min(kWidest, tokens - token);
    tiles.push_back({tile_for(count), token, count, x + token * height});
  }
  return tiles;
}

IndexedLinearArgs check_layout(const Tensor& values, const Tensor& columns, const Tensor& starts, const Tensor& rows,
                               int64_t n, int64_t k, int64_t panel, int64_t block) {
  STD_TORCH_CHECK(panel > 0 && panel <= kMostPanel && panel % kQuad == 0 && block > 0 && block <= kMostBlock,
                  "panel, block: accepted: a multiple of 4 up to 256; 1 to 192");
  const int64_t panels = (n + panel - 1) / panel, blocks = (k + block - 1) / block;
  const int64_t quads = panels * blocks * (panel / kQuad);
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 2 && values.is_contiguous() &&
                      values.size(1) == kQuad,
                  "values: must be contiguous float32 [steps, 4]");
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Byte && columns.dim() == 2 && columns.is_contiguous() &&
                      columns.size(0) == values.size(0) && columns.size(1) == kQuad,
                  "columns: must be contiguous uint8 [steps, 4]");
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Int && starts.dim() == 1 && starts.is_contiguous() &&
                      starts.size(0) == quads + 1,
                  "starts: must be contiguous int32 [panels * blocks * panel / 4 + 1]");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Byte && rows.dim() == 2 && rows.is_contiguous() &&
                      rows.size(0) == quads && rows.size(1) == kQuad,
                  "rows: must be contiguous uint8 [panels * blocks * panel / 4, 4]");
  const IndexedLinearArgs args{values.const_data_ptr<float>(), columns.const_data_ptr<uint8_t>(),
                               starts.const_data_ptr<int32_t>(), rows.const_data_ptr<uint8_t>(), panel, block, blocks};
  STD_TORCH_CHECK(args.starts[quads] == values.size(0), "values: must have as many steps as starts say");
  return args;
}

Tensor indexed_linear(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& starts,
                      const Tensor& rows, const std::optional<Tensor>& bias, int64_t n, int64_t panel, int64_t block,
                      int64_t activation, const std::optional<Tensor>& mul) {
  const LinearOptions options{std::nullopt, bias, activation, mul};
  check_linear(x, static_cast<Stored>(dtype_of(x, "x")), n, options);
  const int64_t tokens = x.size(0), k = x.size(1);
  const IndexedLinearArgs args = check_layout(values, columns, starts, rows, n, k, panel, block);
  LinearOutput output(x, n, options);
  if (tokens == 0 || n == 0) return output.y;

  const Tensor from = rows_contiguous(x);
  const int64_t height = args.blocks * (block + 1), panels = (n + panel - 1) / panel;
  const int widest = kTokenTiles[tile_for(tokens)];
  Tensor turned = torch::stable::new_empty(x, {(tokens + widest - 1) / widest * widest, height}, ScalarType::Float);
  Tensor scratch = torch::stable::new_empty(x, {2 * max_workers() * panel, widest}, ScalarType::Float);
  const std::vector<Tile> tiles = cut_tokens(tokens, height, turned.mutable_data_ptr<float>());
  const auto turn = [&](const auto* p) {
    const int64_t stride = from.stride(0);
    parallel_chunks(static_cast<int64_t>(tiles.size()) * args.blocks, 1 + 32768 / (block * widest),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) {
                        const Tile& tile = tiles[i / args.blocks];
                        const int64_t b = i % args.blocks;
                        transpose_block(p + tile.token * stride, stride, tile.count, b * block,
                                        std::min(k, (b + 1) * block), block, tile.width(),
                                        tile.x + b * (block + 1) * tile.width());
                      }
                    });
  };
  switch (dtype_of(x, "x")) {
    case Dtype::f32:
      turn(static_cast<const float*>(from.const_data_ptr()));
      break;
    case Dtype::bf16:
      turn(static_cast<const bf16*>(from.const_data_ptr()));
      break;
    case Dtype::f16:
      turn(static_cast<const f16*>(from.const_data_ptr()));
      break;
  }

  const IndexedLinearTable& table = indexed_linear_table(active_isa());
  float* sums = scratch.mutable_data_ptr<float>();
  // Panels, not rows, are handed out, each to whoever is free: a panel full of values costs one thread no more than its
  // own time. Registers are filled whether or not their tokens are there: about 30 products a nanosecond; or 2 of a
  // single token.
  const int64_t work = kQuad * values.size(0) / panels * std::max<int64_t>((tokens + widest - 1) / widest * widest, 16);
  parallel_workers(panels, 1 + 262144 / (work + 1), [&](int64_t begin, int64_t end, int64_t worker) {
    float* own = sums + 2 * worker * panel * widest;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first_row = p * panel, count = std::min(panel, n - first_row);
      for (const Tile& tile : tiles) {
        table.panel[tile.which](args, p, tile.x, own);
        write_panel(output.epilogue, own, own + panel * widest, first_row, count, tile.width(), tile.token, tile.count);
      }
    }
  });
  return output.y;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("indexed_linear", TORCH_BOX(&pyfast::indexed_linear)); }
