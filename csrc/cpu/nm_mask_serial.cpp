// nm_mask in portable code: ranks by counting, one group at a time.
#include "nm_mask.h"

namespace pyfast {
namespace {

template <class T>
void nm_mask(const NmMaskArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* scores = static_cast<const T*>(args.scores) + row * args.score_stride;
    uint8_t* mask = args.mask + row * args.k;
    for (int64_t column = 0; column < args.k; column += args.m) {
      const int64_t length = args.m < args.k - column ? args.m : args.k - column;
      float group[kNmMaskMaxGroup];
      int rank[kNmMaskMaxGroup];
      for (int64_t i = 0; i < length; ++i) {
        const float score = widen(scores[column + i]);
        group[i] = score == score ? score : -__builtin_inff();
        rank[i] = 0;
      }
      for (int64_t i = 1; i < length; ++i) {
        for (int64_t j = 0; j < i; ++j) {  // of two, one ranks before the other
          const bool later = group[i] > group[j];
          rank[j] += later;
          rank[i] += !later;
        }
      }
      for (int64_t i = 0; i < length; ++i) mask[column + i] = rank[i] < args.n;
    }
  }
}

}  // namespace

const NmMaskTable kNmMaskSerial = {{nm_mask<float>, nm_mask<bf16>, nm_mask<f16>}};

}  // namespace pyfast
