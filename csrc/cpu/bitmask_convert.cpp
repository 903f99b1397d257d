// Row-major bitmasks on the CPU: checks, threads and registration. The contract is in bitmask_convert.h.
#include "bitmask_convert.h"

#include "sparse_driver.h"

namespace pyfast {
namespace {

BitmaskConvertArgs convert_args(int64_t n, int64_t k) {
  STD_TORCH_CHECK(n >= 0 && k >= 0, "n, k: accepted: 0 or more");
  return {n, k, (k + kTileColumns - 1) / kTileColumns, (k + 7) / 8};
}

int64_t tile_rows(int64_t n) { return (n + kTileRows - 1) / kTileRows; }

const uint64_t* words(const Tensor& bitmaps) {
  return reinterpret_cast<const uint64_t*>(bitmaps.const_data_ptr<int64_t>());
}

std::tuple<Tensor, Tensor, Tensor> from_bitmask(const Tensor& compressed, const Tensor& bitmask,
                                                const Tensor& row_offsets, int64_t k) {
  STD_TORCH_CHECK(bitmask.dim() == 2 && bitmask.scalar_type() == ScalarType::Byte && bitmask.is_contiguous(),
                  "bitmask: must be contiguous uint8 [out_features, in_features / 8]");
  const int64_t n = bitmask.size(0);
  const BitmaskConvertArgs args = convert_args(n, k);
  STD_TORCH_CHECK(bitmask.size(1) == args.row_bytes, "bitmask: must have ceil(in_features / 8) bytes a row");
  STD_TORCH_CHECK(row_offsets.dim() == 1 && row_offsets.scalar_type() == ScalarType::Long &&
                      row_offsets.is_contiguous() && row_offsets.size(0) == n,
                  "row_offsets: must be contiguous int64 [out_features]");
  STD_TORCH_CHECK(compressed.dim() == 1 && compressed.is_contiguous(), "compressed: must be contiguous and flat");
  const int64_t strips = tile_rows(n), tiles = strips * args.tiles;
  Tensor bitmaps = torch::stable::new_empty(compressed, {tiles, kTileRows}, ScalarType::Long);
  Tensor offsets = torch::stable::new_empty(compressed, {tiles + 1}, ScalarType::Long);
  auto* bits = reinterpret_cast<uint64_t*>(bitmaps.mutable_data_ptr<int64_t>());
  int64_t* at = offsets.mutable_data_ptr<int64_t>();
  const auto* mask = static_cast<const uint8_t*>(bitmask.const_data_ptr());
  torch::stable::parallel_for(0, strips, 1,
                              [&](int64_t begin, int64_t end) { bitmask_scan(args, mask, bits, at + 1, begin, end); });
  at[0] = 0;
  for (int64_t i = 0; i < tiles; ++i) at[i + 1] += at[i];
  STD_TORCH_CHECK(at[tiles] == compressed.size(0), "compressed: must have as many elements as the bitmask has bits");

  // Rows that begin and end where the bits say: then no run leaves compressed.
  const int64_t* rows = row_offsets.const_data_ptr<int64_t>();
  std::atomic<bool> agree{n == 0 || rows[0] == 0};
  torch::stable::parallel_for(0, n, kTileRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t next = row + 1 < n ? rows[row + 1] : at[tiles];
      if (next - rows[row] != stored_in_row(args, bits, row)) agree.store(false, std::memory_order_relaxed);
    }
  });
  STD_TORCH_CHECK(agree.load(), "row_offsets: do not agree with the bitmask");

  Tensor values = torch::stable::new_empty(compressed, {at[tiles]});
  with_bits_of(compressed, "compressed", [&](auto unit) {
    using U = decltype(unit);
    const U* from = static_cast<const U*>(compressed.const_data_ptr());
    U* to = static_cast<U*>(values.mutable_data_ptr());
    torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      for_each_run(args, bits, at, rows, begin, end, [&](int64_t source, int64_t target, int64_t count) {
        copy_bytes(to + target, from + source, static_cast<uint64_t>(count) * sizeof(U));
      });
    });
  });
  return {values, bitmaps, offsets};
}

std::tuple<Tensor, Tensor, Tensor> to_bitmask(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets,
                                              int64_t n, int64_t k) {
  const BitmaskConvertArgs args = convert_args(n, k);
  const int64_t strips = tile_rows(n), tiles = strips * args.tiles;
  STD_TORCH_CHECK(bitmaps.scalar_type() == ScalarType::Long && bitmaps.dim() == 2 && bitmaps.size(0) == tiles &&
                      bitmaps.size(1) == kTileRows && bitmaps.is_contiguous(),
                  "bitmaps: must be contiguous int64 [tiles, 16] for the given shape");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 && offsets.size(0) == tiles + 1 &&
                      offsets.is_contiguous(),
                  "offsets: must be contiguous int64 [tiles + 1]");
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values: must be contiguous and flat");
  const uint64_t* bits = words(bitmaps);
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  Tensor row_offsets = torch::stable::new_empty(values, {n}, ScalarType::Long);
  Tensor bitmask = torch::stable::new_empty(values, {n, args.row_bytes}, ScalarType::Byte);
  int64_t* rows = row_offsets.mutable_data_ptr<int64_t>();
  auto* mask = static_cast<uint8_t*>(bitmask.mutable_data_ptr());
  std::atomic<bool> agree{at[0] == 0 && at[tiles] == values.size(0)};
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kTileRows; row < std::min(n, end * kTileRows); ++row) {
      rows[row] = stored_in_row(args, bits, row);
      bitmask_write(args, bits, mask, row);
    }
    for (int64_t tile = begin * args.tiles; tile < end * args.tiles; ++tile) {
      int64_t count = 0;
      for (int r = 0; r < kTileRows; ++r) count += __builtin_popcountll(bits[tile * kTileRows + r]);
      if (at[tile + 1] - at[tile] != count) agree.store(false, std::memory_order_relaxed);
    }
  });
  STD_TORCH_CHECK(agree.load(), "offsets: do not agree with the bitmaps and the values");
  int64_t stored = 0;
  for (int64_t row = 0; row < n; ++row) {
    const int64_t count = rows[row];
    rows[row] = stored;
    stored += count;
  }
  STD_TORCH_CHECK(stored == values.size(0), "bitmaps: hold bits outside the shape");
  Tensor compressed = torch::stable::new_empty(values, {stored});
  with_bits_of(values, "values", [&](auto unit) {
    using U = decltype(unit);
    const U* from = static_cast<const U*>(values.const_data_ptr());
    U* to = static_cast<U*>(compressed.mutable_data_ptr());
    torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      for_each_run(args, bits, at, rows, begin, end, [&](int64_t target, int64_t source, int64_t count) {
        copy_bytes(to + target, from + source, static_cast<uint64_t>(count) * sizeof(U));
      });
    });
  });
  return {compressed, bitmask, row_offsets};
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("bitmap_from_bitmask", TORCH_BOX(&pyfast::from_bitmask));
  m.impl("bitmap_to_bitmask", TORCH_BOX(&pyfast::to_bitmask));
}
