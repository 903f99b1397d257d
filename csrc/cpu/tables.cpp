// Which table of kernels an ISA means, for every op.
#include "bitmap_convert.h"
#include "bitmap_linear.h"
#include "distill_kl.h"
#include "epilogue.h"
#include "indexed_linear.h"
#include "indexed_pairs.h"
#include "nm_mask.h"
#include "sparse24_linear.h"
#include "topk_distill.h"
#include "transpose.h"

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

namespace {

// The look-up does a row of 64 columns in one step where no more than 16 are stored; above a quarter or so many rows
// take two, and the expansion is as fast (docs/kernels.md).
constexpr double kLookUpDensity = 0.3;

BitmapLinearTable with_bf16(BitmapLinearTable table) {
  if (has_avx512_bf16()) table.linear[static_cast<int>(Stored::bf16)] = kBitmapLinearAvx512Bf16;
  return table;
}

}  // namespace

const BitmapLinearTable& bitmap_linear_table(Isa isa, double density) {
  static const bool vbmi2 = has_vbmi2();
  static const BitmapLinearTable lookup = with_bf16(kBitmapLinearAvx512Lookup);
  static const BitmapLinearTable expand = with_bf16(kBitmapLinearAvx512Vbmi2);
  if (isa == Isa::avx512 && vbmi2) return density < kLookUpDensity ? lookup : expand;
  return pick(isa, kBitmapLinearSerial, kBitmapLinearAvx2, kBitmapLinearAvx512);
}

const BitmapConvertTable& bitmap_convert_table(Isa isa) {
  static const bool vbmi2 = has_vbmi2();
  if (isa == Isa::avx512 && vbmi2) return kBitmapConvertAvx512Vbmi2;
  return pick(isa, kBitmapConvertSerial, kBitmapConvertAvx2, kBitmapConvertAvx512);
}

const IndexedLinearTable& indexed_linear_table(Isa isa) {
  return pick(isa, kIndexedLinearSerial, kIndexedLinearAvx2, kIndexedLinearAvx512);
}

const IndexedPairsTable& indexed_pairs_table(Isa isa) {
  static const bool bf16 = has_avx512_bf16();
  return isa == Isa::avx512 && bf16 ? kIndexedPairsAvx512Bf16 : kIndexedPairsSerial;
}

const TopkDistillTable& topk_distill_table(Isa isa) {
  return pick(isa, kTopkDistillSerial, kTopkDistillAvx2, kTopkDistillAvx512);
}

const EpilogueTable& epilogue_table(Isa isa) { return pick(isa, kEpilogueSerial, kEpilogueAvx2, kEpilogueAvx512); }

const TransposeTable& transpose_table(Isa isa) { return pick(isa, kTransposeSerial, kTransposeAvx2, kTransposeAvx512); }

const NmMaskTable& nm_mask_table(Isa isa) { return pick(isa, kNmMaskSerial, kNmMaskAvx2, kNmMaskAvx512); }
#else
const DistillKlTable& distill_kl_table(Isa) { return kDistillKlSerial; }
const Sparse24LinearTable& sparse24_linear_table(Isa) { return kSparse24LinearSerial; }
const BitmapLinearTable& bitmap_linear_table(Isa, double) { return kBitmapLinearSerial; }
const BitmapConvertTable& bitmap_convert_table(Isa) { return kBitmapConvertSerial; }
const IndexedLinearTable& indexed_linear_table(Isa) { return kIndexedLinearSerial; }
const IndexedPairsTable& indexed_pairs_table(Isa) { return kIndexedPairsSerial; }
const TopkDistillTable& topk_distill_table(Isa) { return kTopkDistillSerial; }
const EpilogueTable& epilogue_table(Isa) { return kEpilogueSerial; }
const TransposeTable& transpose_table(Isa) { return kTransposeSerial; }
const NmMaskTable& nm_mask_table(Isa) { return kNmMaskSerial; }
#endif

}  // namespace pyfast
