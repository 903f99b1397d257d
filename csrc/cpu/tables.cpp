// Which table of kernels an ISA means, for every op.
#include "bitmap_linear.h"
#include "distill_kl.h"
#include "nm_mask.h"
#include "sparse24_linear.h"
#include "topk_distill.h"

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

// On Zen 4 vexpandps decodes fast enough to keep memory busy at one token down to a quarter of the elements; below
// that, and where several tokens make the kernel wait for decoding instead, the table look-ups are faster
// (docs/kernels.md).
const BitmapLinearTable& bitmap_linear_table(Isa isa, double density, int64_t tokens) {
  static const bool slow_expand = has_slow_expand();
  const bool narrow = slow_expand && (density < 0.25 || tokens > 1);
  return pick(isa, kBitmapLinearSerial, kBitmapLinearAvx2, narrow ? kBitmapLinearAvx512Narrow : kBitmapLinearAvx512);
}

const TopkDistillTable& topk_distill_table(Isa isa) {
  return pick(isa, kTopkDistillSerial, kTopkDistillAvx2, kTopkDistillAvx512);
}

const NmMaskTable& nm_mask_table(Isa isa) { return pick(isa, kNmMaskSerial, kNmMaskAvx2, kNmMaskAvx512); }
#else
const DistillKlTable& distill_kl_table(Isa) { return kDistillKlSerial; }
const Sparse24LinearTable& sparse24_linear_table(Isa) { return kSparse24LinearSerial; }
const BitmapLinearTable& bitmap_linear_table(Isa, double, int64_t) { return kBitmapLinearSerial; }
const TopkDistillTable& topk_distill_table(Isa) { return kTopkDistillSerial; }
const NmMaskTable& nm_mask_table(Isa) { return kNmMaskSerial; }
#endif

}  // namespace pyfast
