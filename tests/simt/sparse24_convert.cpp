// The kernels of csrc/cuda/sparse24_convert.cuh on the host, launched as in csrc/cuda/sparse24_convert.cu.
#include "simt.h"

#include "sparse24_convert.cuh"

using namespace pyfast::cuda;

namespace {

simt::Shape shape_of(int64_t units, int64_t n, int64_t rows) {
  unsigned across = 1;
  while (across < kSparse24Threads && across < units) across *= 2;
  const dim3 block{across, kSparse24Threads / across};
  const int64_t rows_a_block = int64_t{block.y} * rows;
  return {{static_cast<unsigned>((units + across - 1) / across),
           static_cast<unsigned>((n + rows_a_block - 1) / rows_a_block)},
          block};
}

template <class U>
void decompress(const U* values, const uint8_t* metadata, U* out, int64_t n, int64_t k, int64_t padded,
                int64_t packed) {
  simt::launch(shape_of((k + kPackColumns<U> - 1) / kPackColumns<U>, n, kRowsAThread), sparse24_decompress_kernel<U>,
               Sparse24Weight<U>{values, metadata, padded}, Dense<U>{out, n, k, packed != 0});
}

template <class U>
void compress(const U* dense, const uint32_t* scores, U* values, uint16_t* metadata, uint64_t* violation, int64_t n,
              int64_t k, int64_t padded, int64_t packed, int64_t magnitude) {
  const DenseRows<U> rows{dense, n, k, k, packed != 0};
  const DenseRows<uint32_t> ranks{scores, n, k, k, k % 4 == 0};
  const auto kernel = scores != nullptr ? sparse24_compress_kernel<U, Keep::scores>
                      : magnitude != 0  ? sparse24_compress_kernel<U, Keep::magnitude>
                                        : sparse24_compress_kernel<U, Keep::stored>;
  simt::launch(shape_of(padded / kUnitColumns, n, 1), kernel, rows, ranks, Sparse24Out<U>{values, metadata, padded},
               violation);
}

template <class U>
void gather(const U* dense, const uint16_t* metadata, U* values, int64_t n, int64_t k, int64_t padded, int64_t packed) {
  simt::launch(shape_of(padded / kUnitColumns, n, 1), sparse24_gather_kernel<U>,
               DenseRows<U>{dense, n, k, k, packed != 0}, metadata, values, padded);
}

}  // namespace

#define EXPORTS(size, U)                                                                                               \
  SIMT_EXPORT decompress_##size(const U* values, const uint8_t* metadata, U* out, int64_t n, int64_t k,                \
                                int64_t padded, int64_t packed) {                                                      \
    decompress(values, metadata, out, n, k, padded, packed);                                                           \
  }                                                                                                                    \
  SIMT_EXPORT compress_##size(const U* dense, const uint32_t* scores, U* values, uint16_t* metadata,                   \
                              uint64_t* violation, int64_t n, int64_t k, int64_t padded, int64_t packed,               \
                              int64_t magnitude) {                                                                     \
    compress(dense, scores, values, metadata, violation, n, k, padded, packed, magnitude);                             \
  }                                                                                                                    \
  SIMT_EXPORT gather_##size(const U* dense, const uint16_t* metadata, U* values, int64_t n, int64_t k, int64_t padded, \
                            int64_t packed) {                                                                          \
    gather(dense, metadata, values, n, k, padded, packed);                                                             \
  }

EXPORTS(2, uint16_t)
EXPORTS(4, uint32_t)
