// Which table of kernels an ISA means, for every op.
#include "bitmap_linear.h"
#include "distill_kl.h"
#include "sparse24_linear.h"

namespace pyfast {
namespace {

template <class Table>
const Table& pick(Isa isa, const Table& serial, const Table& avx2, const Table& avx512) {
  return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : serial;
}

}  // namespace

#if defined(__x86_64__)
const DistillKlTable& distill_kl_table(Isa isa) {
  return pick(isa, kDistillKlSerial, kDistillKlAvx2, kDistillKlAvx512);
}

const Sparse24LinearTable& sparse24_linear_table(Isa isa) {
  return pick(isa, kSparse24LinearSerial, kSparse24LinearAvx2, kSparse24LinearAvx512);
}

// Zen 4 decodes 11.6 billion positions a second and core with vexpandps, which is enough to keep memory busy down to
// a quarter of the elements; below that the table's 15 billion show (docs/kernels.md).
const BitmapLinearTable& bitmap_linear_table(Isa isa, double density) {
  static const bool slow_expand = has_slow_expand();
  const bool narrow = slow_expand && density < 0.25;
  return pick(isa, kBitmapLinearSerial, kBitmapLinearAvx2, narrow ? kBitmapLinearAvx512Narrow : kBitmapLinearAvx512);
}
#else
const DistillKlTable& distill_kl_table(Isa) { return kDistillKlSerial; }
const Sparse24LinearTable& sparse24_linear_table(Isa) { return kSparse24LinearSerial; }
const BitmapLinearTable& bitmap_linear_table(Isa, double) { return kBitmapLinearSerial; }
#endif

}  // namespace pyfast
