// indexed_linear on the CPU: checks, threads, activations transposed, sums turned back, registration. The contract is
// in indexed_linear.h.
#include "indexed_linear.h"

#include <vector>

#include "sparse_driver.h"
#include "transpose.h"

namespace pyfast {
namespace {

// The smallest tile that holds the tokens, or the widest.
int tile_for(int64_t tokens) {
  int i = 0;
  while (i + 1 < kTokenTileCount && kTokenTiles[i] < tokens) ++i;
  return i;
}

// Tokens that go through the kernel together: as many as the widest tile holds, the last ones in the narrowest tile
// that holds them.
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

// Sums of a panel [rows, tile] to the outputs of the tile's tokens, by way of `turned` [tile, rows and kApart more]:
// turned into y itself they would be scattered over it. kApart: the tokens' rows lie in different sets of the cache.
constexpr int64_t kApart = 16;
void write_panel(const Epilogue& e, const float* sums, float* turned, int64_t first_row, int64_t rows,
                 const Tile& tile) {
  const int64_t stride = rows + kApart;
  transpose_table(active_isa())
      .of[static_cast<int>(Dtype::f32)](sums, tile.width(), rows, tile.count, turned, stride, rows);
  const EpilogueKernel kernel = epilogue_table(active_isa()).from_float[static_cast<int>(e.dtype)];
  for (int64_t t = 0; t < tile.count; ++t) kernel(e, turned + t * stride, first_row, tile.token + t, rows);
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
  const IndexedLinearArgs args{values.const_data_ptr<float>(),
                               columns.const_data_ptr<uint8_t>(),
                               starts.const_data_ptr<int32_t>(),
                               rows.const_data_ptr<uint8_t>(),
                               panel,
                               block,
                               blocks};
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
  Tensor scratch = torch::stable::new_empty(x, {max_workers(), (2 * panel + kApart) * widest}, ScalarType::Float);
  const std::vector<Tile> tiles = cut_tokens(tokens, height, turned.mutable_data_ptr<float>());
  const TransposeKernel turn = transpose_table(active_isa()).of[static_cast<int>(dtype_of(x, "x"))];
  const auto* rows_of_x = static_cast<const char*>(from.const_data_ptr());
  const int64_t itemsize = static_cast<int64_t>(x.element_size()), stride = from.stride(0);
  parallel_chunks(
      static_cast<int64_t>(tiles.size()) * args.blocks, 1 + 32768 / (block * widest), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Tile& tile = tiles[i / args.blocks];
          const int64_t b = i % args.blocks, width = tile.width(), here = std::min(block, k - b * block);
          float* out = tile.x + b * (block + 1) * width;
          turn(rows_of_x + (tile.token * stride + b * block) * itemsize, stride, tile.count, here, out, width, width);
          std::fill(out + here * width, out + (block + 1) * width, 0.0f);
        }
      });

  const IndexedLinearTable& table = indexed_linear_table(active_isa());
  float* sums = scratch.mutable_data_ptr<float>();
  // Panels, not rows, are handed out, each to whoever is free: a panel full of values costs one thread no more than its
  // own time. Registers are filled whether or not their tokens are there: about 30 products a nanosecond; or 2 of a
  // single token.
  const int64_t work = kQuad * values.size(0) / panels * std::max<int64_t>((tokens + widest - 1) / widest * widest, 16);
  parallel_workers(panels, 1 + 262144 / (work + 1), [&](int64_t begin, int64_t end, int64_t worker) {
    float* own = sums + worker * (2 * panel + kApart) * widest;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first_row = p * panel, count = std::min(panel, n - first_row);
      for (const Tile& tile : tiles) {
        table.panel[tile.which](args, p, tile.x, own);
        write_panel(output.epilogue, own, own + panel * widest, first_row, count, tile);
      }
    }
  });
  return output.y;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("indexed_linear", TORCH_BOX(&pyfast::indexed_linear)); }
