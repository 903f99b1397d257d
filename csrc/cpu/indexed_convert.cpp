// The layout of indexed_linear from a container on the CPU: checks, threads, registration. The contract is in
// indexed_convert.h.
#include "indexed_convert.h"

#include <vector>

#include "sparse_driver.h"

namespace pyfast {
namespace {

using Layout = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // values, columns, starts, rows

template <class Value, class Source>
Layout build(const Tensor& like, const IndexedShape& s, const Source& source) {
  const int64_t parts = (s.n + s.panel - 1) / s.panel * s.blocks, quads = parts * s.quads();
  Tensor starts = torch::stable::new_empty(like, {quads + 1}, ScalarType::Int);
  Tensor rows = torch::stable::new_empty(like, {quads, kQuad}, ScalarType::Byte);
  int32_t* at = starts.mutable_data_ptr<int32_t>();
  uint8_t* row = rows.mutable_data_ptr<uint8_t>();
  // body(panel, block, index of the first quad) for every block of every panel
  const auto each = [&](const auto& body) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / s.blocks, i % s.blocks, i * s.quads());
    });
  };
  each([&](int64_t p, int64_t b, int64_t q) { order_rows<Value>(s, source, p, b, row + kQuad * q, at + 1 + q); });
  at[0] = 0;
  int64_t sum = 0;
  for (int64_t i = 1; i <= quads; ++i) {
    sum += at[i];
    STD_TORCH_CHECK(sum <= INT32_MAX, "weight: more than 2^33 stored elements have no indexed layout");
    at[i] = static_cast<int32_t>(sum);
  }
  constexpr bool pairs = kEntriesOfStep<Value> == 2;
  const std::vector<int64_t> size = pairs ? std::vector<int64_t>{sum, kQuad, 2} : std::vector<int64_t>{sum, kQuad};
  Tensor values = torch::stable::new_empty(like, size, pairs ? ScalarType::BFloat16 : ScalarType::Float);
  Tensor columns = torch::stable::new_empty(like, size, ScalarType::Byte);
  advise_huge_pages(values);
  advise_huge_pages(columns);
  Value* value = static_cast<Value*>(values.mutable_data_ptr());
  uint8_t* column = columns.mutable_data_ptr<uint8_t>();
  each([&](int64_t p, int64_t b, int64_t q) { write_quads(s, source, p, b, at + q, row + kQuad * q, value, column); });
  return {values, columns, starts, rows};
}

IndexedShape shape_of(int64_t n, int64_t k, int64_t panel, int64_t block) {
  STD_TORCH_CHECK(panel > 0 && panel % kTileRows == 0 && panel <= kMostPanel,
                  "panel: accepted: a multiple of 16 up to 256");
  STD_TORCH_CHECK(block > 0 && block % kTileColumns == 0 && block <= kMostBlock, "block: accepted: 64, 128 or 192");
  STD_TORCH_CHECK(n >= 0 && k >= 0, "n, k: accepted: 0 or more");
  return {n, k, panel, block, (k + block - 1) / block};
}

const float* scales_of(const std::optional<Tensor>& scales, const Tensor& values, int64_t n) {
  STD_TORCH_CHECK((stored_as(values) == Stored::i8) == scales.has_value(), "scales: go with int8 values, only there");
  if (!scales.has_value()) return nullptr;
  STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float && scales->is_contiguous() && scales->dim() == 1 &&
                      scales->size(0) == n,
                  "scales: must be contiguous float32 [out_features]");
  return scales->const_data_ptr<float>();
}

// The layout of a container. source(pointer to the values as what they are): where they are found.
template <class SourceOf>
Layout layout_of(const Tensor& values, const IndexedShape& shape, bool pairs, const SourceOf& source) {
  const void* v = values.const_data_ptr();
  const Stored stored = stored_as(values);
  STD_TORCH_CHECK(!pairs || stored == Stored::bf16, "pairs: accepted: True for bfloat16 values alone");
  switch (stored) {
    case Stored::f32:
      return build<float>(values, shape, source(static_cast<const float*>(v)));
    case Stored::bf16:
      if (pairs) return build<bf16>(values, shape, source(static_cast<const bf16*>(v)));
      return build<float>(values, shape, source(static_cast<const bf16*>(v)));
    case Stored::f16:
      return build<float>(values, shape, source(static_cast<const f16*>(v)));
    case Stored::i8:
      return build<float>(values, shape, source(static_cast<const int8_t*>(v)));
  }
  STD_TORCH_CHECK(false, "values: unknown dtype");
}

Layout sparse24_to_indexed(const Tensor& values, const Tensor& metadata, const std::optional<Tensor>& scales, int64_t k,
                           int64_t panel, int64_t block, bool pairs) {
  STD_TORCH_CHECK(values.dim() == 2 && values.is_contiguous(), "values: must be contiguous [out_features, k / 2]");
  const int64_t n = values.size(0), k_padded = 2 * values.size(1);
  const IndexedShape shape = shape_of(n, k, panel, block);
  STD_TORCH_CHECK(k <= k_padded && k > k_padded - 32, "k: does not agree with the weight");
  STD_TORCH_CHECK(metadata.scalar_type() == ScalarType::Short && metadata.is_contiguous() && metadata.dim() == 2 &&
                      metadata.size(0) == n && metadata.size(1) == k_padded / 16,
                  "metadata: must be contiguous int16 [out_features, k / 16]");
  const float* scale = scales_of(scales, values, n);
  return layout_of(values, shape, pairs, [&]<class T>(const T* v) {
    return Sparse24Source<T>{v, static_cast<const uint16_t*>(metadata.const_data_ptr()), k_padded, scale};
  });
}

Layout bitmap_to_indexed(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets,
                         const std::optional<Tensor>& scales, int64_t n, int64_t k, int64_t panel, int64_t block,
                         bool pairs) {
  const IndexedShape shape = shape_of(n, k, panel, block);
  const int64_t tiles = (k + kTileColumns - 1) / kTileColumns;
  const int64_t all = tiles * ((n + kTileRows - 1) / kTileRows);
  STD_TORCH_CHECK(bitmaps.scalar_type() == ScalarType::Long && bitmaps.is_contiguous() && bitmaps.dim() == 2 &&
                      bitmaps.size(0) == all && bitmaps.size(1) == kTileRows,
                  "bitmaps: must be contiguous int64 [tiles, 16] for the given shape");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.is_contiguous() && offsets.dim() == 1 &&
                      offsets.size(0) == all + 1,
                  "offsets: must be contiguous int64 [tiles + 1]");
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous() && values.size(0) == at[all],
                  "values: must be contiguous, with as many elements as the last offset says");
  const float* scale = scales_of(scales, values, n);
  return layout_of(values, shape, pairs, [&]<class T>(const T* v) {
    return BitmapSource<T>{v, reinterpret_cast<const uint64_t*>(bitmaps.const_data_ptr<int64_t>()), at, tiles, scale};
  });
}

}  // namespace
}  // namespace pyfast

STABLE_TORCH_LIBRARY_IMPL(pyfast, CPU, m) {
  m.impl("sparse24_to_indexed", TORCH_BOX(&pyfast::sparse24_to_indexed));
  m.impl("bitmap_to_indexed", TORCH_BOX(&pyfast::bitmap_to_indexed));
}
