// sliced_linear: y = f(x Wᵀ + bias) · mul for few tokens, driven by the stored values of W: 16 bits, float32 sums.
//
// Layout, derived from a bitmap weight (pyfast/sparse/sliced.py): rows sorted by their number of entries, 32 of them
// are a slice, a lane owns a row. An entry is a value and the distance from the column of the entry before it, in 4 or
// 8 bits, whichever makes the weight smaller; the first one counts from column 0. A longer distance is bridged by
// entries of the largest distance and the value +0.0; entries of +0.0 without distance fill a row up to whole chunks of
// 8. A slice has as many chunks as its longest row needs, one at least.
//
//   chunk    values   lane 0: v0 v1 v2 v3 v4 v5 v6 v7 │ lane 1: … │ … lane 31            16 bytes a lane
//            deltas   8 bits: d0 … d7, or 4 bits: byte i is d(i) | d(i + 4) << 4          8 or 4 bytes a lane
//
// Entries of +0.0 add nothing whatever stands in x: NaN reaches only the rows that store something in its column.
//
// Bytes at density d: 2.5·d·n·k with 4 bits, of which bridges make 3.6 % more at 80 % sparsity; 3·d·n·k with 8 bits,
// less than that from about 88 % on. Filling and tables are 1 to 5 %, as n is large or small. Dense has 1.6, 2.6, 3.8,
// 6.5 times the bytes at 50, 70, 80, 90 %.
//
// Work is cut without regard to rows: the chunks of all slices in one sequence, in equal ranges for the blocks (one a
// multiprocessor), and these for 16 warps each, so that every warp has the same number of chunks, give or take one,
// whatever the pattern is. A warp is told the slice in which it begins and the columns that its lanes have reached. It
// finishes whole slices alone.
//
//   slices   │ 0                                   │ 1            │ 2   │ 3 …
//   warps    │ 0             │ 1             │ 2             │ 3             │ 4 …
//   parts    │ tail          │ head          │head │ tail    │head│whole│tail│
//
// The warp in which a slice ends adds the parts of its block, through shared memory; of a slice that blocks share, the
// warp that takes the last ticket adds their sums, through global memory. Both go in ascending order: the result does
// not depend on who is first.
//
// x stands in shared memory for all columns: as float32 for one token, else 2 bytes a token side by side. Values and
// deltas go straight into registers, kAhead chunks before they are used: 61 to 98 KB of a multiprocessor are on their
// way. A turn of kAhead chunks waits once for all its loads, for ptxas gives them one scoreboard.
//
// A launch of few bytes is a chain of round trips to memory. While the grid before still runs, the first 8 chunks of
// each warp come to L2 (10.8 MB with 132 blocks and 4 bits). Then
//
//   x, the warp's segment and starts, the first kAhead chunks      one round trip, together
//   rows, ends                                                     beside the second turn
//   a slice that blocks share: sums out, ticket, sums back         one each, by the warp alone: no barrier of the block
//
// Instructions. dp4a adds up to four bytes, each times the bytes of a column, to an address: 1 instruction an entry for
// its delta, its scaling and the sum. Then 1 load of x, 1 to widen the value, 1 or 2 to see whether it is +0.0 and, for
// each token, 1 FMA under that predicate, and 1 to widen x where it has 16 bits. Counted in the code for sm_90, and the
// passes of the loads of x in shared memory counted for random patterns (lanes meet in the banks), 8 entries of a warp:
//
//                        1      2      4      8 tokens
//   instructions        46     74    106    170      bfloat16 with 4 bits; 3 fewer with 8
//   cycles to issue     18     30     42     68      of a multiprocessor, at 2.5 a cycle
//   cycles of shared    27     27     48     84      2.5–3.1, 5.2–5.8, 9.6–10.1 passes a load, and 5 for the entries
//   cycles of bytes     49                           59 with 8 bits; 640 or 768 bytes at 3.0 TB/s and 132 at 1.75 GHz
//
// So up to 4 tokens the bytes bind, and at 8 the shared memory, at 0.58 of the bandwidth.
//
// Resources; the shared memory is that of 4096 columns, in all kColumnBytes of each and 128 more:
//
//   sliced_linear_kernel<T, 1, 4>     112 registers    16512 bytes of shared memory
//   sliced_linear_kernel<T, 2, 4>     112 registers    16512 bytes of shared memory
//   sliced_linear_kernel<T, 4, 4>     112 registers    32896 bytes of shared memory
//   sliced_linear_kernel<T, 8, 4>     128 registers    65664 bytes of shared memory
//   sliced_linear_kernel<T, 1, 8>     128 registers    16512 bytes of shared memory
//   sliced_linear_kernel<T, 2, 8>     128 registers    16512 bytes of shared memory
//   sliced_linear_kernel<T, 4, 8>     120 registers    32896 bytes of shared memory
//   sliced_linear_kernel<T, 8, 8>     128 registers    65664 bytes of shared memory
#pragma once

#include "common.cuh"
#include "epilogue.cuh"

namespace pyfast::cuda {

inline constexpr int kSliceRows = 32;
inline constexpr int kChunkEntries = 8;  // of a lane

// Tokens: 1, 2, 4 or 8. Bits of a delta: 4 or 8.
template <int Tokens, int Bits>
struct SlicedLinearPlan {
  static_assert(Tokens == 1 || Tokens == 2 || Tokens == 4 || Tokens == 8);
  static_assert(Bits == 4 || Bits == 8);
  static constexpr int kWarps = 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kAhead = Tokens <= 2 ? 8 : 6;
  static constexpr int kColumnBytes = Tokens == 1 ? 4 : 2 * Tokens;
  static constexpr int kSlots = 2 * kWarps;  // parts of slices in a block
  static constexpr int kSlotFloats = Tokens * kSliceRows;
  static constexpr int kTableBytes = kSlots * 4;

  // Where the slots' table begins: behind x, whose place their sums take.
  static PYFAST_HOST_DEVICE constexpr int table_at(int columns) {
    const int x = (columns * kColumnBytes + 15) / 16 * 16, sums = kSlots * kSlotFloats * 4;
    return x > sums ? x : sums;
  }
  static PYFAST_HOST_DEVICE constexpr int shared_bytes(int columns) { return table_at(columns) + kTableBytes; }
};

struct SlicedLinearArgs {
  const uint16_t* values;        // [chunks, 32, 8]
  const uint8_t* deltas;         // [chunks, 32, bits]
  const uint16_t* starts;        // [blocks · 16, 32], the column that each lane has reached where a warp begins
  const int32_t* segments;       // [blocks · 16, 4], the slice in which a warp begins, that slice's begin and end, 0
  const int32_t* ends;           // [slices], the chunk at which each ends
  const int32_t* rows;           // [slices, 32], the row of each lane; -1: none
  const uint16_t* x;             // [tokens, columns], rows at multiples of 16 bytes
  int64_t x_stride;              // elements from token to token
  int32_t tokens, columns;       // columns: that may be read, a multiple of 8
  int32_t block_chunks, longer;  // the first `longer` blocks have one chunk more than block_chunks, 1 or more
  float* partial;                // [blocks, 2, Tokens, 32]
  uint32_t* counters;            // [blocks], zero before and after
  Epilogue out;
};

#if defined(PYFAST_KERNELS)

PYFAST_DEVICE int block_begin(const SlicedLinearArgs& args, int block) {
  return block * args.block_chunks + (block < args.longer ? block : args.longer);
}
PYFAST_DEVICE int block_of(const SlicedLinearArgs& args, int chunk) {
  const int split = args.longer * (args.block_chunks + 1);
  return chunk < split ? chunk / (args.block_chunks + 1) : args.longer + (chunk - split) / args.block_chunks;
}

template <int Bits>
using SlicedDeltas = std::conditional_t<Bits == 8, Words2, uint32_t>;

template <int Bits>
struct SlicedChunk {
  Words4 values;
  SlicedDeltas<Bits> deltas;
};

// A lane's way through its chunks.
template <int Bits>
struct SlicedStream {
  const Words4* values;
  const SlicedDeltas<Bits>* deltas;

  PYFAST_DEVICE SlicedChunk<Bits> load(int ahead) const {
    return {ptx::ld_streaming(values + ahead * 32), ptx::ld_streaming(deltas + ahead * 32)};
  }
  PYFAST_DEVICE void advance(int chunks) {
    values += chunks * 32;
    deltas += chunks * 32;
  }
};

// Word i of 4, 2 or 1.
PYFAST_DEVICE uint32_t word_of(uint32_t word, int) { return word; }
PYFAST_DEVICE uint32_t word_of(const Words2& words, int i) { return i == 0 ? words.x : words.y; }
PYFAST_DEVICE uint32_t word_of(const Words4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// The bytes of the distances of entries 4·half … 4·half + 3.
PYFAST_DEVICE uint32_t four_deltas(uint32_t deltas, int half) { return deltas >> 4 * half & 0x0f0f0f0fu; }
PYFAST_DEVICE uint32_t four_deltas(const Words2& deltas, int half) { return word_of(deltas, half); }

// sums[token] += value · x[token], x at `column` in shared memory, unless the value is +0.0. The value is one half of
// pair.
template <class T, int Tokens>
PYFAST_DEVICE void add_product(float (&sums)[Tokens], uint32_t pair, int half, uint32_t column) {
  const uint32_t stored = pair & (half == 0 ? 0xffffu : 0xffff0000u);
  const Floats2 weights = ptx::unpack<T>(pair);
  const float weight = half == 0 ? weights.x : weights.y;
  if constexpr (Tokens == 1) {
    const float x = __builtin_bit_cast(float, ptx::ld_shared<uint32_t>(column));
    ptx::fma_unless_zero(stored, sums[0], weight, x);
  } else {
    uint32_t words[Tokens / 2];
    if constexpr (Tokens == 2) {
      words[0] = ptx::ld_shared<uint32_t>(column);
    } else if constexpr (Tokens == 4) {
      const Words2 two = ptx::ld_shared<Words2>(column);
      words[0] = two.x, words[1] = two.y;
    } else {
      const Words4 four = ptx::ld_shared<Words4>(column);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    }
    PYFAST_UNROLL
    for (int i = 0; i < Tokens / 2; ++i) {
      const Floats2 x = ptx::unpack<T>(words[i]);
      ptx::fma_unless_zero(stored, sums[2 * i], weight, x.x);
      ptx::fma_unless_zero(stored, sums[2 * i + 1], weight, x.y);
    }
  }
}

// The entries of a chunk; `at` is the address in shared memory of the column that the lane has reached.
template <class T, int Tokens, int Bits>
PYFAST_DEVICE void add_chunk(float (&sums)[Tokens], const SlicedChunk<Bits>& chunk, uint32_t& at) {
  constexpr uint32_t kScale = SlicedLinearPlan<Tokens, Bits>::kColumnBytes * 0x01010101u;
  const uint32_t pairs[4] = {chunk.values.x, chunk.values.y, chunk.values.z, chunk.values.w};
  PYFAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t deltas = four_deltas(chunk.deltas, half), from = at;
    PYFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      at = ptx::dot4(deltas, kScale >> 8 * (3 - i), from);
      add_product<T>(sums, pairs[2 * half + i / 2], i % 2, at);
    }
  }
}

// What a thread brings to shared memory at once of x, [column][token] there. A unit is 8, 4 or 2 neighbouring columns
// of all tokens, stored 16 bytes at a time.
template <class T, int Tokens, int Threads>
struct SlicedColumns {
  static constexpr int kColumns = Tokens == 1 ? 8 : Tokens == 2 ? 4 : 2;
  static constexpr int kWords = Tokens == 1 ? 8 : kColumns * Tokens / 2;  // of 4 bytes, that they take in shared memory
  static constexpr int kBatch = Tokens == 1 ? 2 : 4;
  static constexpr int kStep = kBatch * Threads;
  using Unit = std::conditional_t<kColumns == 8, Words4, std::conditional_t<kColumns == 4, Words2, uint32_t>>;
  Unit read[kBatch][Tokens];

  PYFAST_DEVICE void load(const SlicedLinearArgs& args, int units, int first) {
    PYFAST_UNROLL
    for (int i = 0; i < kBatch; ++i) PYFAST_UNROLL
    for (int token = 0; token < Tokens; ++token) {
      const int unit = first + i * Threads;
      const bool there = unit < units && token < args.tokens;
      read[i][token] =
          there ? ptx::ld_global(reinterpret_cast<const Unit*>(args.x + token * args.x_stride) + unit) : Unit{};
    }
  }

  PYFAST_DEVICE void store(unsigned char* to, int units, int first) const {
    PYFAST_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int unit = first + i * Threads;
      if (unit >= units) break;
      uint32_t words[kWords];
      PYFAST_UNROLL
      for (int column = 0; column < kColumns; column += 2) PYFAST_UNROLL
      for (int token = 0; token < Tokens; token += 2) {
        const uint32_t pair = word_of(read[i][token], column / 2);
        if constexpr (Tokens == 1) {
          const Floats2 both = ptx::unpack<T>(pair);
          words[column] = __builtin_bit_cast(uint32_t, both.x);
          words[column + 1] = __builtin_bit_cast(uint32_t, both.y);
        } else {
          const uint32_t other = word_of(read[i][token + 1], column / 2);
          words[(column * Tokens + token) / 2] = ptx::byte_permute(pair, other, 0x5410u);
          words[((column + 1) * Tokens + token) / 2] = ptx::byte_permute(pair, other, 0x7632u);
        }
      }
      PYFAST_UNROLL
      for (int j = 0; j < kWords; j += 4)
        reinterpret_cast<Words4*>(to)[(unit * kWords + j) / 4] = {words[j], words[j + 1], words[j + 2], words[j + 3]};
    }
  }
};

// Finishes a row; -1: none.
template <class T, int Tokens>
PYFAST_DEVICE void write_row(const SlicedLinearArgs& args, int row, const float (&sums)[Tokens]) {
  if (row < 0) return;
  for (int token = 0; token < args.tokens; ++token) {
    float sum = sums[0];
    PYFAST_UNROLL
    for (int i = 1; i < Tokens; ++i) sum = token == i ? sums[i] : sum;
    write_output<T>(args.out, token, row, sum);
  }
}

PYFAST_DEVICE int lowest_bit(uint32_t bits) { return ptx::highest_bit(bits & (0u - bits)); }

// The sum of `parts` parts, in order. next() gives where each lies: the lane's float of token 0, then every 32nd. 8 of
// them are read before any is added.
template <int Tokens, class Next>
PYFAST_DEVICE void add_parts(float (&total)[Tokens], int parts, const Next& next) {
  constexpr int kTogether = 8 / Tokens;
  for (int first = 0; first < parts; first += kTogether) {
    float read[kTogether][Tokens] = {};
    PYFAST_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= parts) break;
      const float* const from = next();
      PYFAST_UNROLL
      for (int token = 0; token < Tokens; ++token) read[i][token] = from[token * kSliceRows];
    }
    PYFAST_UNROLL
    for (int i = 0; i < kTogether; ++i) PYFAST_UNROLL
    for (int token = 0; token < Tokens; ++token) total[token] += read[i][token];
  }
}

// Grid: the blocks of the layout.
template <class T, int Tokens, int Bits>
__global__ void __launch_bounds__(SlicedLinearPlan<Tokens, Bits>::kThreads, 1)
    sliced_linear_kernel(const SlicedLinearArgs args) {
  using Plan = SlicedLinearPlan<Tokens, Bits>;
  constexpr int kAhead = Plan::kAhead;
  using Columns = SlicedColumns<T, Tokens, Plan::kThreads>;
  PYFAST_DYNAMIC_SHARED(shared);
  ptx::launch_dependents();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x), worker = block * Plan::kWarps + warp;
  const int from = block_begin(args, block), to = block_begin(args, block + 1);
  const int first = from + (to - from) * warp / Plan::kWarps, last = from + (to - from) * (warp + 1) / Plan::kWarps;

  SlicedStream<Bits> stream{};
  const int64_t begins_at = static_cast<int64_t>(first) * 32 + lane;
  stream.values = reinterpret_cast<const Words4*>(args.values) + begins_at;
  stream.deltas = reinterpret_cast<const SlicedDeltas<Bits>*>(args.deltas) + begins_at;

  // While the grid before this one ends, the warp's first 8 chunks come to L2, and its lines of the tables.
  constexpr int kLines = Bits / 4;  // of the deltas of a chunk
  if (first + lane / 4 < last) ptx::prefetch_l2(stream.values - lane + lane * 8);
  if (lane < 8 * kLines && first + lane / kLines < last) ptx::prefetch_l2(stream.deltas - lane + lane * (32 / kLines));
  if (lane == 0) ptx::prefetch_l2(args.segments + worker * 4), ptx::prefetch_l2(args.starts + worker * 32);
  ptx::keep(stream.values), ptx::keep(stream.deltas);  // computed once, before the wait
  ptx::wait_prerequisites();

  // All that does not wait for anything is asked for at once; x comes first, it is needed first.
  const int units = args.columns / Columns::kColumns;
  Columns x;
  x.load(args, units, thread);
  const Words4 segment = ptx::ld_global(reinterpret_cast<const Words4*>(args.segments) + worker);
  const uint32_t start = args.starts[worker * 32 + lane];
  SlicedChunk<Bits> ring[kAhead] = {};
  PYFAST_UNROLL
  for (int i = 0; i < kAhead; ++i)
    if (first + i < last) ring[i] = stream.load(i);
  x.store(shared, units, thread);
  for (int unit = thread + Columns::kStep; unit < units; unit += Columns::kStep) {
    x.load(args, units, unit);
    x.store(shared, units, unit);
  }

  int slice = static_cast<int>(segment.x), begin = static_cast<int>(segment.y), end = static_cast<int>(segment.z);
  const uint32_t base = ptx::shared_address(shared);
  uint32_t at = base + start * static_cast<uint32_t>(Plan::kColumnBytes);
  ptx::syncthreads();

  // Adds the chunks up to `stop`, kAhead of them a turn, so that each finds its place in the ring when the code is
  // compiled; gives how many it took in the last turn.
  float sums[Tokens] = {}, head[Tokens] = {};
  // The lane's row and where the slice after this one ends are asked for behind the first chunk: before it, that chunk
  // would wait for them too.
  int chunk = first, row = -1, next = 0;
  const auto walk = [&](int stop) {
    for (bool begins = true;; begins = false) {
      const int left = stop - chunk, more = last - chunk;
      PYFAST_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        add_chunk<T>(sums, ring[i], at);
        if (i == 0 && begins) {
          row = args.rows[slice * kSliceRows + lane];
          if (stop < last) next = args.ends[slice + 1];
        }
        if (kAhead + i < more) ring[i] = stream.load(kAhead + i);
        if (i + 1 == left) {
          chunk = stop;
          return left;
        }
      }
      chunk += kAhead;
      stream.advance(kAhead);
    }
  };
  // A slice that reaches beyond the warp's chunks: on the left (the head), or on the right alone (the tail).
  struct Part {
    int slice, begin, end;
  };
  Part head_part{-1, 0, 0}, tail_part{-1, 0, 0};
  while (chunk < last) {
    const int stop = end < last ? end : last;
    const int turned = walk(stop);
    if (begin < first) {
      head_part = {slice, begin, end};
      PYFAST_UNROLL
      for (int token = 0; token < Tokens; ++token) head[token] = sums[token];
    } else if (end > last) {
      tail_part = {slice, begin, end};
    } else {
      write_row<T>(args, row, sums);
    }
    if (stop == last) break;
    stream.advance(turned);
    for (int turn = 0; turn < turned; ++turn) {
      const SlicedChunk<Bits> used = ring[0];
      PYFAST_UNROLL
      for (int i = 1; i < kAhead; ++i) ring[i - 1] = ring[i];
      ring[kAhead - 1] = used;
    }
    PYFAST_UNROLL
    for (int token = 0; token < Tokens; ++token) sums[token] = 0.0f;
    at = base;
    begin = end, end = next;
    ++slice;
  }
  ptx::syncthreads();

  // The sums of heads and tails take the place of x, two slots for each warp.
  float* const slots = reinterpret_cast<float*>(shared) + lane;
  int32_t* const slot_slices = reinterpret_cast<int32_t*>(shared + Plan::table_at(args.columns));
  PYFAST_UNROLL
  for (int token = 0; token < Tokens; ++token) {
    if (head_part.slice >= 0) slots[2 * warp * Plan::kSlotFloats + token * 32] = head[token];
    if (tail_part.slice >= 0) slots[(2 * warp + 1) * Plan::kSlotFloats + token * 32] = sums[token];
  }
  if (lane == 0) slot_slices[2 * warp] = head_part.slice, slot_slices[2 * warp + 1] = tail_part.slice;
  ptx::syncthreads();

  // The warp with the last part of a slice in the block adds them. Blocks share at most one slice on the left, and one
  // on the right alone: the block of its first part, and how many there are.
  const int slot_slice = slot_slices[lane];
  int first_block[2] = {}, parts[2] = {}, rows[2] = {};
  PYFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Part part = i == 0 ? head_part : tail_part;
    if (part.slice < 0 || (part.end > last && last < to)) continue;
    rows[i] = args.rows[part.slice * kSliceRows + lane];
    float total[Tokens] = {};
    uint32_t rest = ptx::ballot(slot_slice == part.slice);
    add_parts(total, ptx::popc(rest), [&]() -> const float* {
      const int slot = lowest_bit(rest);
      rest &= rest - 1;
      return slots + slot * Plan::kSlotFloats;
    });
    const bool left = part.begin<from, right = part.end> to;
    if (!left && !right) {
      write_row<T>(args, rows[i], total);
      continue;
    }
    PYFAST_UNROLL
    for (int token = 0; token < Tokens; ++token)
      args.partial[(2 * block + (left ? 0 : 1)) * Plan::kSlotFloats + token * 32 + lane] = total[token];
    first_block[i] = left ? block_of(args, part.begin) : block;
    parts[i] = (right ? block_of(args, part.end - 1) : block) - first_block[i] + 1;
  }
  if (parts[0] == 0 && parts[1] == 0) return;

  // One lane takes a ticket for each; the warp that has the last one finishes the slice.
  ptx::syncwarp();
  const int own_parts = lane == 0 ? parts[0] : lane == 1 ? parts[1] : 0;
  uint32_t ticket = 0;
  if (own_parts != 0)
    ticket = ptx::atomic_ticket(args.counters + (lane == 0 ? first_block[0] : first_block[1]),
                                static_cast<uint32_t>(own_parts));
  ptx::syncwarp();
  PYFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int number = static_cast<int>(ptx::shfl(ticket, i));
    if (parts[i] == 0 || number + 1 != parts[i]) continue;
    float total[Tokens] = {};
    int at_block = first_block[i], half = 1;
    add_parts(total, parts[i], [&]() -> const float* {
      const float* const part = args.partial + (2 * at_block + half) * Plan::kSlotFloats + lane;
      ++at_block, half = 0;
      return part;
    });
    write_row<T>(args, rows[i], total);
  }
}

#endif

}  // namespace pyfast::cuda
