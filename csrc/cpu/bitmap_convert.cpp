// Conversions of BitmapWeight on the CPU: the walk over tiles, threads, registration. The kernels' contract is in
// bitmap_convert.h.
//
// A tile that lies within the matrix is converted where it is; one that its edge cuts goes through a copy padded with
// zeros. A bit in the padding (of a damaged weight) therefore names no memory of the matrix.
#include "bitmap_convert.h"

#include "sparse_driver.h"

namespace pyfast {
namespace {

struct BitmapConvertArgs {
  int64_t n, k;          // of the dense matrix
  int64_t dense_stride;  // elements between dense rows
  int64_t tiles;         // in a row of tiles
};

BitmapConvertArgs convert_args(int64_t n, int64_t k, int64_t dense_stride) {
  return {n, k, dense_stride, (k + kTileColumns - 1) / kTileColumns};
}

// What of a tile lies within the matrix, and a copy of it.
template <class U>
struct Tile {
  int64_t row, column, rows, columns;
  U copy[kTileRows * kTileColumns];

  Tile(const BitmapConvertArgs& a, int64_t at)
      : row(at / a.tiles * kTileRows),
        column(at % a.tiles * kTileColumns),
        rows(std::min<int64_t>(kTileRows, a.n - row)),
        columns(std::min<int64_t>(kTileColumns, a.k - column)) {}

  bool whole() const { return rows == kTileRows && columns == kTileColumns; }

  void copy_from(const U* dense, int64_t stride) {
    clear_bytes(copy, sizeof copy);
    for (int64_t r = 0; r < rows; ++r)
      copy_bytes(copy + r * kTileColumns, dense + r * stride, static_cast<uint64_t>(columns) * sizeof(U));
  }
  void copy_to(U* dense, int64_t stride) const {
    for (int64_t r = 0; r < rows; ++r)
      copy_bytes(dense + r * stride, copy + r * kTileColumns, static_cast<uint64_t>(columns) * sizeof(U));
  }
};

// Bitmaps of tile rows [begin, end), and how many elements each of their tiles stores.
template <class U>
void scan_tiles(const BitmapConvertArgs& a, const U* dense, uint64_t* bitmaps, int64_t* counts, int64_t begin,
                int64_t end) {
  const ScanKernel scan = bitmap_convert_table(active_isa()).scan[kSizeIndex<U>];
  for (int64_t at = begin * a.tiles; at < end * a.tiles; ++at) {
    Tile<U> tile(a, at);
    const U* from = dense + tile.row * a.dense_stride + tile.column;
    uint64_t* words = bitmaps + at * kTileRows;
    if (tile.whole()) {
      scan(from, a.dense_stride, kTileRows, words);
    } else {
      tile.copy_from(from, a.dense_stride);
      scan(tile.copy, kTileColumns, kTileRows, words);
    }
    counts[at] = 0;
    for (int r = 0; r < kTileRows; ++r) counts[at] += __builtin_popcountll(words[r]);
  }
}

// Values of tile rows [begin, end): the elements of dense that the bitmaps name, whatever they are.
template <class U>
void pack_tiles(const BitmapConvertArgs& a, const U* dense, const uint64_t* bitmaps, const int64_t* offsets, U* values,
                int64_t begin, int64_t end) {
  const PackKernel pack = bitmap_convert_table(active_isa()).pack[kSizeIndex<U>];
  for (int64_t at = begin * a.tiles; at < end * a.tiles; ++at) {
    Tile<U> tile(a, at);
    const U* from = dense + tile.row * a.dense_stride + tile.column;
    const uint64_t* words = bitmaps + at * kTileRows;
    if (tile.whole()) {
      pack(from, a.dense_stride, kTileRows, words, values + offsets[at]);
    } else {
      tile.copy_from(from, a.dense_stride);
      pack(tile.copy, kTileColumns, kTileRows, words, values + offsets[at]);
    }
  }
}

// Dense rows of tile rows [begin, end); dense points at the first of them. `stored`: how many values there are in all.
template <class U>
void expand_tiles(const BitmapConvertArgs& a, const U* values, int64_t stored, const uint64_t* bitmaps,
                  const int64_t* offsets, U* dense, int64_t begin, int64_t end) {
  const ExpandKernel expand = bitmap_convert_table(active_isa()).expand[kSizeIndex<U>];
  U last[kTileRows * kTileColumns + kExpandOverread];
  for (int64_t at = begin * a.tiles; at < end * a.tiles; ++at) {
    Tile<U> tile(a, at);
    const U* from = values + offsets[at];
    if (offsets[at + 1] + kExpandOverread > stored) {
      copy_bytes(last, from, static_cast<uint64_t>(offsets[at + 1] - offsets[at]) * sizeof(U));
      from = last;
    }
    const uint64_t* words = bitmaps + at * kTileRows;
    U* to = dense + (tile.row - begin * kTileRows) * a.dense_stride + tile.column;
    if (tile.whole()) {
      expand(from, words, kTileRows, to, a.dense_stride);
    } else {
      expand(from, words, kTileRows, tile.copy, kTileColumns);
      tile.copy_to(to, a.dense_stride);
    }
  }
}

int64_t tile_rows(int64_t n) { return (n + kTileRows - 1) / kTileRows; }

void check_bitmap(const Tensor& bitmaps, const Tensor& offsets, int64_t n, int64_t k) {
  const int64_t tiles = tile_rows(n) * ((k + kTileColumns - 1) / kTileColumns);
  STD_TORCH_CHECK(bitmaps.scalar_type() == ScalarType::Long && bitmaps.dim() == 2 && bitmaps.size(0) == tiles &&
                      bitmaps.size(1) == kTileRows && bitmaps.is_contiguous(),
                  "bitmaps: must be contiguous int64 [tiles, 16] for the given shape");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 && offsets.size(0) == tiles + 1 &&
                      offsets.is_contiguous(),
                  "offsets: must be contiguous int64 [tiles + 1]");
}

// Runs body(U{}, begin, end) over tile rows, U the unsigned integer of the element's size.
template <class Body>
void for_tile_rows(const Tensor& elements, const char* name, int64_t rows, Body body) {
  with_bits_of(elements, name, [&](auto unit) {
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { body(unit, begin, end); });
  });
}

Tensor gather(const Tensor& dense, const Tensor& bitmaps, const Tensor& offsets, int64_t stored) {
  STD_TORCH_CHECK(dense.dim() == 2, "dense: must have shape [out_features, in_features]");
  const Tensor d = rows_contiguous(dense);
  const int64_t n = d.size(0), k = d.size(1);
  check_bitmap(bitmaps, offsets, n, k);
  const BitmapConvertArgs args = convert_args(n, k, d.stride(0));
  const auto* bits = reinterpret_cast<const uint64_t*>(bitmaps.const_data_ptr<int64_t>());
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(stored == at[offsets.size(0) - 1], "stored: must be the last offset");
  Tensor values = torch::stable::new_empty(dense, {stored});
  for_tile_rows(d, "dense", tile_rows(n), [&](auto unit, int64_t begin, int64_t end) {
    using U = decltype(unit);
    pack_tiles(args, static_cast<const U*>(d.const_data_ptr()), bits, at, static_cast<U*>(values.mutable_data_ptr()),
               begin, end);
  });
  return values;
}

std::tuple<Tensor, Tensor, Tensor> compress(const Tensor& dense) {
  STD_TORCH_CHECK(dense.dim() == 2, "dense: must have shape [out_features, in_features]");
  const Tensor d = rows_contiguous(dense);
  const int64_t n = d.size(0), k = d.size(1);
  const BitmapConvertArgs args = convert_args(n, k, d.stride(0));
  const int64_t tiles = tile_rows(n) * args.tiles;
  Tensor bitmaps = torch::stable::new_empty(dense, {tiles, kTileRows}, ScalarType::Long);
  Tensor offsets = torch::stable::new_empty(dense, {tiles + 1}, ScalarType::Long);
  auto* bits = reinterpret_cast<uint64_t*>(bitmaps.mutable_data_ptr<int64_t>());
  int64_t* at = offsets.mutable_data_ptr<int64_t>();
  for_tile_rows(d, "dense", tile_rows(n), [&](auto unit, int64_t begin, int64_t end) {
    using U = decltype(unit);
    scan_tiles(args, static_cast<const U*>(d.const_data_ptr()), bits, at + 1, begin, end);
  });
  at[0] = 0;
  for (int64_t i = 0; i < tiles; ++i) at[i + 1] += at[i];
  return {gather(d, bitmaps, offsets, at[tiles]), bitmaps, offsets};
}

}  // namespace

void bitmap_decompress_rows(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets, int64_t n,
                            Tensor& dense, int64_t begin) {
  const int64_t rows = dense.size(0), k = dense.size(1);
  check_bitmap(bitmaps, offsets, n, k);
  const BitmapConvertArgs args = convert_args(begin + rows, k, k);
  const auto* bits = reinterpret_cast<const uint64_t*>(bitmaps.const_data_ptr<int64_t>());
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  const int64_t stored = values.size(0);
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous() && stored == at[offsets.size(0) - 1],
                  "values: must be contiguous, with as many elements as the last offset says");
  const int64_t first = begin / kTileRows;
  for_tile_rows(values, "values", tile_rows(begin + rows) - first, [&](auto unit, int64_t from, int64_t to) {
    using U = decltype(unit);
    expand_tiles(args, static_cast<const U*>(values.const_data_ptr()), stored, bits, at,
                 static_cast<U*>(dense.mutable_data_ptr()) + from * kTileRows * k, first + from, first + to);
  });
}

namespace {

Tensor decompress(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets, int64_t n, int64_t k) {
  Tensor dense = torch::stable::new_empty(values, {n, k});
  advise_huge_pages(dense);
  bitmap_decompress_rows(values, bitmaps, offsets, n, dense, 0);
  return dense;
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("bitmap_compress", TORCH_BOX(&pyfast::compress));
  m.impl("bitmap_decompress", TORCH_BOX(&pyfast::decompress));
  m.impl("bitmap_gather", TORCH_BOX(&pyfast::gather));
}
