// sparse24_linear, portable: the definition of the product, one kept weight at a time.
#include "sparse24_linear.h"

namespace pyfast {
namespace {

template <class T>
void sparse24_linear(const Sparse24LinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* values = static_cast<const T*>(a.values) + row * (a.k / 2);
    const uint16_t* metadata = a.metadata + row * (a.k / 16);
    for (int64_t token = 0; token < a.tokens; ++token) {
      const float* x = a.x + token * a.x_stride;
      float sum = 0.0f;
      for (int64_t j = 0; j < a.k / 2; ++j) {
        const int64_t kept = (metadata[j / 8] >> (2 * (j % 8))) & 3;
        sum += widen(values[j]) * x[j / 2 * 4 + kept];
      }
      write_output(a.out, row, token, sum);
    }
  }
}

}  // namespace

const Sparse24LinearTable kSparse24LinearSerial = {
    {sparse24_linear<float>, sparse24_linear<bf16>, sparse24_linear<f16>, sparse24_linear<int8_t>},
};

}  // namespace pyfast
