"""Constants of the cost model for a CPU that has not been calibrated: cycles of each kernel, at 3 GHz.

They are counted from the instructions of each kernel and brought near to what a Zen 5 and a Zen 4 take (docs/kernels.md
has the tables): good enough to order kernels that are far apart. Where two are near each other,
:func:`pyfast.sparse.plan` takes the one that needs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyfast.sparse.cost_model import DENSE_TOKENS, Constants, Lists, Rates, Row


@dataclass(frozen=True)
class _Cycles:
    """Cycles of one thread. Rows are as in :class:`Rates` and :class:`Lists`."""

    bitmap: tuple[Row, ...]
    sparse24: Row
    decompress: float
    entry: Row
    start: Row
    flops: int  # a cycle, of a good dense library
    pack: float = 1.0  # of a position, where F.linear packs its weight at a call of several tokens
    turn: float = 1.0
    bf16_bitmap: tuple[Row, ...] = ()  # bfloat16 multiplied as it is
    pair_entry: Row = ()
    pair_start: Row = ()
    pair_turn: float = 1.0


_SERIAL = _Cycles(
    bitmap=((0.5, 1.0, 2.0, 4.0), (0.6, 1.5, 3.0, 5.0), (1.0, 2.0, 5.0, 8.0)),
    sparse24=(2.0, 2.5, 4.0),
    decompress=4.0,
    entry=(1.5, 8.0, 16.0, 32.0, 64.0),
    start=(4.0, 24.0, 48.0, 96.0, 192.0),
    flops=32,
)
_AVX2 = _Cycles(
    bitmap=((0.3, 0.3, 0.35, 0.35), (0.42, 0.42, 0.5, 0.5), (0.9, 0.9, 1.0, 1.0)),
    sparse24=(0.4, 0.5, 0.8),
    decompress=0.6,
    entry=(0.9, 0.9, 1.5, 3.0, 5.7),
    start=(2.5, 4.5, 8.0, 18.0, 33.0),
    flops=32,
)
_AVX512 = _Cycles(  # expands, whatever is stored
    bitmap=((0.2,) * 4, (0.28,) * 4, (0.4,) * 4),
    sparse24=(0.15, 0.25, 0.4),
    decompress=0.5,
    entry=(0.45, 0.8, 1.0, 1.7, 3.1),
    start=(4.0, 4.5, 6.0, 10.0, 22.0),
    flops=64,
)
_AVX512_VBMI2 = _Cycles(  # up to a quarter stored, a row of a tile is one look-up
    bitmap=((0.12, 0.13, 0.14, 0.14), (0.14, 0.15, 0.19, 0.19), (0.2, 0.22, 0.26, 0.26)),
    sparse24=(0.15, 0.25, 0.4),
    decompress=0.5,
    entry=(0.45, 0.8, 1.0, 1.7, 3.1),
    start=(4.0, 4.5, 6.0, 10.0, 22.0),
    flops=64,
    bf16_bitmap=((0.075,) * 4, (0.12,) * 4, (0.18,) * 4),
    # Pairs were not timed on a Zen 5: as much less than single entries as on a Zen 4.
    pair_entry=(0.22, 0.7, 0.7, 1.0, 1.75),
    pair_start=(4.0, 6.0, 6.0, 10.0, 24.0),
)
_HALVES = _Cycles(  # Zen 4: every 512-bit instruction takes a unit twice
    bitmap=((0.15, 0.17, 0.23, 0.24), (0.2, 0.25, 0.3, 0.3), (0.34, 0.4, 0.47, 0.5)),
    sparse24=(0.16, 0.3, 0.65),
    decompress=0.8,
    entry=(0.42, 0.85, 1.25, 2.2, 4.4),
    start=(10.0, 12.0, 14.0, 16.0, 26.0),
    flops=38,
    pack=0.5,
    turn=1.7,
    bf16_bitmap=((0.13, 0.13, 0.14, 0.15), (0.18, 0.18, 0.19, 0.2), (0.28, 0.28, 0.3, 0.3)),
    pair_entry=(0.22, 1.0, 1.0, 1.45, 2.6),
    pair_start=(9.0, 12.0, 12.0, 18.0, 30.0),
    pair_turn=0.9,
)
_GHZ = 3.0
_READ_GBPS_A_THREAD, _READ_GBPS_AT_MOST = 15.0, 200.0
_DENSE_EFFICIENCY = 0.85
_FLOAT16_DENSE = 8.0  # time of a dense product over that of float32, without instructions for it


def _cycles(isa: str, vbmi2: bool, halves: bool) -> _Cycles:
    if isa != "avx512":
        return {"serial": _SERIAL, "avx2": _AVX2}[isa]
    if not vbmi2:
        return _AVX512
    return _HALVES if halves else _AVX512_VBMI2


def built_in(
    isa: str,
    threads: int,
    *,
    packs: bool = True,
    bfloat16: float = 1.0,
    vbmi2: bool = True,
    bf16: bool = False,
    halves: bool = False,
) -> Constants:
    """The constants for an ISA and a number of threads, 15 GB/s each.

    Args:
        packs: whether torch comes with a library that packs weights.
        bfloat16: time of a dense product over that of float32, less than 1 where the processor has instructions for it.
        vbmi2, bf16: whether the processor has these parts of AVX-512; ``bf16`` goes with ``vbmi2``.
        halves: whether it takes 512 bits in two halves.
    """
    cycles = _cycles(isa, vbmi2, halves)
    ps = 1e3 / _GHZ / threads  # of one cycle
    flops = cycles.flops * _DENSE_EFFICIENCY

    def times(row: Row) -> Row:
        return tuple(ps * c for c in row)

    def dense(slower: float, pack: float) -> Row:
        return times(tuple(slower * (2 * t / flops + (pack if t > 1 else 0.0)) for t in DENSE_TOKENS))

    def rates(slower: float, packed: bool, bitmap: tuple[Row, ...] = cycles.bitmap) -> Rates:
        return Rates(
            bitmap=tuple(map(times, bitmap)),
            sparse24=times(cycles.sparse24),
            bitmap_decompress=ps * cycles.decompress,
            sparse24_decompress=ps * cycles.decompress,
            dense=dense(slower, cycles.pack),
            packed=dense(slower, 0.0) if packed else (),
        )

    multiplies_bf16 = isa == "avx512" and vbmi2 and bf16
    pairs = Lists(times(cycles.pair_entry), times(cycles.pair_start), ps * cycles.pair_turn)
    return Constants(
        source="built-in",
        read_gbps=min(_READ_GBPS_A_THREAD * threads, _READ_GBPS_AT_MOST),
        call_us=10.0,
        singles=Lists(times(cycles.entry), times(cycles.start), ps * cycles.turn),
        pairs=pairs if multiplies_bf16 else None,
        rates={
            "float32": rates(1.0, packs),
            "bfloat16": rates(bfloat16, packs, cycles.bf16_bitmap if multiplies_bf16 else cycles.bitmap),
            "float16": rates(_FLOAT16_DENSE, False),
        },
    )
