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

class IndexedProduct final : public LinearProduct {
 public:
  IndexedProduct(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& starts, const Tensor& rows,
                 int64_t n, int64_t panel, int64_t block, const LinearOptions& options)
      : LinearProduct(x, n, options),
        args_{static_cast<const float*>(keep(values)),
              static_cast<const uint8_t*>(keep(columns)),
              static_cast<const int32_t*>(keep(starts)),
              static_cast<const uint8_t*>(keep(rows)),
              panel,
              block,
              (k_ + block - 1) / block},
        panels_((n + panel - 1) / panel),
        entries_(kQuad * values.size(0)) {}

 protected:
  void multiply_rows(const void* x, int64_t stride, const Epilogue& epilogue) const override {
    const int64_t height = args_.blocks * (args_.block + 1), widest = kTokenTiles[tile_for(tokens_)];
    const int64_t padded_tokens = (tokens_ + widest - 1) / widest * widest;
    const int64_t own_floats = (2 * args_.panel + kApart) * widest;
    const Scratch turned(padded_tokens * height), sums(max_workers() * own_floats);
    const std::vector<Tile> tiles = cut_tokens(tokens_, height, turned.get());
    turn(x, stride, tiles, widest);
    const IndexedLinearTable& table = indexed_linear_table(active_isa());
    // Panels, not rows, are handed out, each to whoever is free: a panel full of values costs one thread no more than
    // its own time. Registers are filled whether or not their tokens are there: about 30 products a nanosecond; or 2 of
    // a single token.
    const int64_t work = entries_ / panels_ * std::max<int64_t>(padded_tokens, 16);
    parallel_workers(panels_, 1 + 262144 / (work + 1), [&](int64_t begin, int64_t end, int64_t worker) {
      float* own = sums.get() + worker * own_floats;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first_row = p * args_.panel, count = std::min(args_.panel, n_ - first_row);
        for (const Tile& tile : tiles) {
          table.panel[tile.which](args_, p, tile.x, own);
          write_panel(epilogue, own, own + args_.panel * widest, first_row, count, tile);
        }
      }
    });
  }

 private:
  // x to the tiles, a block of columns at a time, each with its row of zeros.
  void turn(const void* x, int64_t stride, const std::vector<Tile>& tiles, int64_t widest) const {
    const TransposeKernel kernel = transpose_table(active_isa()).of[static_cast<int>(dtype_)];
    const auto* rows_of_x = static_cast<const char*>(x);
    const int64_t itemsize = dtype_ == Dtype::f32 ? 4 : 2, block = args_.block;
    const auto body = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Tile& tile = tiles[i / args_.blocks];
        const int64_t b = i % args_.blocks, width = tile.width(), here = std::min(block, k_ - b * block);
        float* out = tile.x + b * (block + 1) * width;
        kernel(rows_of_x + (tile.token * stride + b * block) * itemsize, stride, tile.count, here, out, width, width);
        std::fill(out + here * width, out + (block + 1) * width, 0.0f);
      }
    };
    parallel_chunks(static_cast<int64_t>(tiles.size()) * args_.blocks, 1 + 32768 / (block * widest), body);
  }

  IndexedLinearArgs args_;
  int64_t panels_, entries_;
};

void check_layout(const Tensor& values, const Tensor& columns, const Tensor& starts, const Tensor& rows, int64_t n,
                  int64_t k, int64_t panel, int64_t block) {
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
  STD_TORCH_CHECK(starts.const_data_ptr<int32_t>()[quads] == values.size(0),
                  "values: must have as many steps as starts say");
}

Tensor indexed_linear(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& starts,
                      const Tensor& rows, const std::optional<Tensor>& bias, int64_t n, int64_t panel, int64_t block,
                      int64_t activation, const std::optional<Tensor>& mul) {
  const LinearOptions options{std::nullopt, bias, activation, mul};
  check_linear(x, static_cast<Stored>(dtype_of(x, "x")), n, options);
  check_layout(values, columns, starts, rows, n, x.size(1), panel, block);
  return LinearProduct::serve(
      std::make_unique<IndexedProduct>(x, values, columns, starts, rows, n, panel, block, options), x, mul);
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("indexed_linear", TORCH_BOX(&pyfast::indexed_linear)); }
