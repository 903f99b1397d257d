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

const BitmapLinearTable& bitmap_linear_table(Isa isa) {
  static const bool narrow = prefers_narrow_expand();
  return pick(isa, kBitmapLinearSerial, kBitmapLinearAvx2, narrow ? kBitmapLinearAvx512Narrow : kBitmapLinearAvx512);
}
#else
const DistillKlTable& distill_kl_table(Isa) { return kDistillKlSerial; }
const Sparse24LinearTable& sparse24_linear_table(Isa) { return kSparse24LinearSerial; }
const BitmapLinearTable& bitmap_linear_table(Isa) { return kBitmapLinearSerial; }
#endif

}  // namespace pyfast
