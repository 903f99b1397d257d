// sparse24_decompress_kernel on the host, launched as in csrc/cuda/sparse24_convert.cu.
#include "simt.h"

#include "sparse24_convert.cuh"

namespace {

template <class U>
void decompress(const U* values, const uint8_t* metadata, U* out, int64_t n, int64_t k, int64_t padded,
                int64_t packed) {
  using namespace pyfast::cuda;
  const int64_t chunks = (k + kPackColumns<U> - 1) / kPackColumns<U>;
  unsigned across = 1;
  while (across < kSparse24Threads && across < chunks) across *= 2;
  const dim3 block{across, kSparse24Threads / across};
  const int64_t rows_a_block = int64_t{block.y} * kRowsAThread;
  const dim3 grid{static_cast<unsigned>((chunks + across - 1) / across),
                  static_cast<unsigned>((n + rows_a_block - 1) / rows_a_block)};
  simt::launch({grid, block}, sparse24_decompress_kernel<U>, Sparse24Weight<U>{values, metadata, padded},
               Dense<U>{out, n, k, packed != 0});
}

}  // namespace

SIMT_EXPORT decompress_2(const uint16_t* values, const uint8_t* metadata, uint16_t* out, int64_t n, int64_t k,
                         int64_t padded, int64_t packed) {
  decompress(values, metadata, out, n, k, padded, packed);
}
SIMT_EXPORT decompress_4(const uint32_t* values, const uint8_t* metadata, uint32_t* out, int64_t n, int64_t k,
                         int64_t padded, int64_t packed) {
  decompress(values, metadata, out, n, k, padded, packed);
}
