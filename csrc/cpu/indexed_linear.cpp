// indexed_linear on the CPU: checks, threads, activations transposed, sums turned back, registration. The contract is
// in indexed_linear.h.
#include "indexed_linear.h"

#include <vector>

#include "indexed_pairs.h"
#include "sparse_driver.h"
#include "transpose.h"

namespace pyfast {
namespace {

// How entries of each kind are multiplied, one by one or in pairs. turn(): the activations [tokens, columns] of rows
// `stride` apart to out [columns, tile], zeros where a tile has no token.
struct Singles {
  using Value = float;
  static constexpr const auto& tiles = kTokenTiles;

  static IndexedLinearKernel<float> kernel(int which) { return indexed_linear_table(active_isa()).panel[which]; }

  static void turn(Dtype dtype, const void* x, int64_t stride, int64_t tokens, int64_t columns, float* out, int tile) {
    transpose_table(active_isa()).of[static_cast<int>(dtype)](x, stride, tokens, columns, out, tile, tile);
  }
};

struct Pairs {
  using Value = bf16;
  static constexpr const auto& tiles = kPairTiles;

  static IndexedLinearKernel<bf16> kernel(int which) { return indexed_pairs_table(active_isa()).panel[which]; }

  static void turn(Dtype, const void* x, int64_t stride, int64_t tokens, int64_t columns, bf16* out, int tile) {
    const auto* in = static_cast<const bf16*>(x);
    if (tile == 1) return copy_bytes(out, in, columns * sizeof(bf16));
    const TransposeKernel transpose = transpose_table(active_isa()).of[static_cast<int>(Dtype::bf16)];
    const auto pack = indexed_pairs_table(active_isa()).pack;
    const int lanes = std::min(tile, kMostPairLanes);
    alignas(64) float wide[kMostBlock * kMostPairLanes];
    for (int64_t t = 0; t < tile; t += lanes) {
      const int64_t here = std::min<int64_t>(tokens - t, lanes);  // some: a tile is no wider than it need be
      transpose(in + t * stride, stride, here, columns, wide, lanes, lanes);
      pack(wide, columns, lanes, out + t, tile);
    }
  }
};

// The smallest tile that holds the tokens, or the widest.
template <class Entries>
int tile_for(int64_t tokens) {
  int i = 0;
  while (i + 1 < static_cast<int>(std::size(Entries::tiles)) && Entries::tiles[i] < tokens) ++i;
  return i;
}

// Tokens that go through the kernel together: as many as the widest tile holds, the last ones in the narrowest tile
// that holds them.
template <class Entries>
struct Tile {
  int which;  // in Entries::tiles
  int64_t token, count;
  typename Entries::Value* x;  // [blocks · (block + 1), width]

  int width() const { return Entries::tiles[which]; }
};

template <class Entries>
std::vector<Tile<Entries>> cut_tokens(int64_t tokens, int64_t height, typename Entries::Value* x) {
  constexpr int64_t kWidest = Entries::tiles[std::size(Entries::tiles) - 1];
  std::vector<Tile<Entries>> tiles;
  for (int64_t token = 0; token < tokens; token += kWidest) {
    const int64_t count = std::min(kWidest, tokens - token);
    tiles.push_back({tile_for<Entries>(count), token, count, x + token * height});
  }
  return tiles;
}

// Sums of a panel [rows, tile] to the outputs of the tile's tokens, by way of `turned` [tile, rows and kApart more]:
// turned into y itself they would be scattered over it. kApart: the tokens' rows lie in different sets of the cache.
constexpr int64_t kApart = 16;
template <class Entries>
void write_panel(const Epilogue& e, const float* sums, float* turned, int64_t first_row, int64_t rows,
                 const Tile<Entries>& tile) {
  const int64_t stride = rows + kApart;
  transpose_table(active_isa())
      .of[static_cast<int>(Dtype::f32)](sums, tile.width(), rows, tile.count, turned, stride, rows);
  const EpilogueKernel kernel = epilogue_table(active_isa()).from_float[static_cast<int>(e.dtype)];
  for (int64_t t = 0; t < tile.count; ++t) kernel(e, turned + t * stride, first_row, tile.token + t, rows);
}

template <class Entries>
class IndexedProduct final : public LinearProduct {
  using Value = typename Entries::Value;

 public:
  IndexedProduct(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& starts, const Tensor& rows,
                 int64_t n, int64_t panel, int64_t block, const LinearOptions& options)
      : LinearProduct(x, n, options),
        args_{static_cast<const Value*>(keep(values)),
              static_cast<const uint8_t*>(keep(columns)),
              static_cast<const int32_t*>(keep(starts)),
              static_cast<const uint8_t*>(keep(rows)),
              panel,
              block,
              (k_ + block - 1) / block},
        panels_((n + panel - 1) / panel),
        entries_(values.numel()) {}

 protected:
  void multiply_rows(const void* x, int64_t stride, const Epilogue& epilogue) const override {
    const int64_t height = args_.blocks * (args_.block + 1), widest = Entries::tiles[tile_for<Entries>(tokens_)];
    const int64_t padded_tokens = (tokens_ + widest - 1) / widest * widest;
    const int64_t own_floats = (2 * args_.panel + kApart) * widest;
    const Scratch turned((padded_tokens * height * sizeof(Value) + sizeof(float) - 1) / sizeof(float));
    const Scratch sums(max_workers() * own_floats);
    const auto tiles = cut_tokens<Entries>(tokens_, height, reinterpret_cast<Value*>(turned.get()));
    turn(x, stride, tiles, widest);
    // Panels, not rows, are handed out, each to whoever is free: a panel full of values costs one thread no more than
    // its own time. Registers are filled whether or not their tokens are there: about 30 products a nanosecond; or 2 of
    // a single token.
    const int64_t work = entries_ / panels_ * std::max<int64_t>(padded_tokens, 16);
    parallel_workers(panels_, 1 + 262144 / (work + 1), [&](int64_t begin, int64_t end, int64_t worker) {
      float* own = sums.get() + worker * own_floats;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first_row = p * args_.panel, count = std::min(args_.panel, n_ - first_row);
        for (const Tile<Entries>& tile : tiles) {
          Entries::kernel(tile.which)(args_, p, tile.x, own);
          write_panel(epilogue, own, own + args_.panel * widest, first_row, count, tile);
        }
      }
    });
  }

 private:
  // x to the tiles, a block of columns at a time, each with its row of zeros.
  void turn(const void* x, int64_t stride, const std::vector<Tile<Entries>>& tiles, int64_t widest) const {
    const auto* rows_of_x = static_cast<const char*>(x);
    const int64_t itemsize = dtype_ == Dtype::f32 ? 4 : 2, block = args_.block;
    const auto body = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Tile<Entries>& tile = tiles[i / args_.blocks];
        const int64_t b = i % args_.blocks, here = std::min(block, k_ - b * block);
        const int width = tile.width();
        Value* out = tile.x + b * (block + 1) * width;
        const char* in = rows_of_x + (tile.token * stride + b * block) * itemsize;
        Entries::turn(dtype_, in, stride, tile.count, here, out, width);
        std::fill(out + here * width, out + (block + 1) * width, Value{});
      }
    };
    parallel_chunks(static_cast<int64_t>(tiles.size()) * args_.blocks, 1 + 32768 / (block * widest), body);
  }

  IndexedLinearArgs<Value> args_;
  int64_t panels_, entries_;
};

void check_layout(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& starts,
                  const Tensor& rows, int64_t n, int64_t panel, int64_t block) {
  STD_TORCH_CHECK(panel > 0 && panel <= kMostPanel && panel % kQuad == 0 && block > 0 && block <= kMostBlock,
                  "panel, block: accepted: a multiple of 4 up to 256; 1 to 192");
  const int64_t panels = (n + panel - 1) / panel, blocks = (x.size(1) + block - 1) / block;
  const int64_t quads = panels * blocks * (panel / kQuad);
  const bool pairs = values.scalar_type() == ScalarType::BFloat16;
  const auto fits = [&](const Tensor& t) {
    return t.dim() == (pairs ? 3 : 2) && t.is_contiguous() && t.size(1) == kQuad && (!pairs || t.size(2) == 2);
  };
  STD_TORCH_CHECK((pairs || values.scalar_type() == ScalarType::Float) && fits(values),
                  "values: must be contiguous float32 [steps, 4] or bfloat16 [steps, 4, 2]");
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Byte && fits(columns) && columns.size(0) == values.size(0),
                  "columns: must be contiguous uint8 of the shape of values");
  STD_TORCH_CHECK(!pairs || x.scalar_type() == ScalarType::BFloat16, "x: must be bfloat16 where values are");
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
  check_layout(x, values, columns, starts, rows, n, panel, block);
  const auto serve = [&]<class Entries>(Entries) {
    return LinearProduct::serve(
        std::make_unique<IndexedProduct<Entries>>(x, values, columns, starts, rows, n, panel, block, options), x, mul);
  };
  return values.scalar_type() == ScalarType::BFloat16 ? serve(Pairs{}) : serve(Singles{});
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) { m.impl("indexed_linear", TORCH_BOX(&pyfast::indexed_linear)); }
