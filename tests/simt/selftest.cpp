// The kernels of selftest.cuh on the host.
#include "simt.h"

#include "selftest.cuh"

using namespace pyfast::cuda;

SIMT_EXPORT sparse_product(const uint16_t* values, const uint16_t* metadata, const uint16_t* b, float* c, int64_t k,
                           int64_t bfloat16, int64_t selector) {
  const auto kernel = bfloat16
                          ? (selector ? selftest::sparse_product<BFloat16, 1> : selftest::sparse_product<BFloat16, 0>)
                          : (selector ? selftest::sparse_product<Float16, 1> : selftest::sparse_product<Float16, 0>);
  simt::launch({{1}, {32}}, kernel, values, metadata, b, c, static_cast<int>(k));
}

SIMT_EXPORT dense_product(const uint16_t* a, const uint16_t* bt, float* c, int64_t bfloat16) {
  simt::launch({{1}, {32}}, bfloat16 ? selftest::dense_product<BFloat16> : selftest::dense_product<Float16>, a, bt, c);
}

SIMT_EXPORT block_sums(const float* numbers, float* sums, float* total, uint32_t* counter, float* mean, int64_t blocks,
                       int64_t threads) {
  const size_t shared = static_cast<size_t>(threads / 32) * sizeof(float);
  simt::launch({{static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, 1, shared}, selftest::block_sums,
               numbers, sums, total, counter, mean);
}

SIMT_EXPORT warp_scan(const uint32_t* words, uint32_t* out) {
  simt::launch({{1}, {32}}, selftest::warp_scan, words, out);
}

SIMT_EXPORT marked_pairs(const uint32_t* words, const uint16_t* values, uint32_t* out) {
  simt::launch({{1}, {32}, 1, 512}, selftest::marked_pairs, words, values, out);
}

SIMT_EXPORT by_address(const uint32_t* words, uint32_t* out) {
  simt::launch({{2}, {32}, 2, 256}, selftest::by_address, words, out);
}

SIMT_EXPORT reversed_rows(const uint32_t* from, uint32_t* to, int64_t rows) {
  simt::launch({{1}, {32}}, selftest::reversed_rows<3>, from, to, static_cast<int>(rows));
}

SIMT_EXPORT cluster_sums(const float* numbers, float* out, int64_t blocks, int64_t cluster) {
  simt::launch({{static_cast<unsigned>(blocks)}, {64}, static_cast<unsigned>(cluster)}, selftest::cluster_sums, numbers,
               out);
}
