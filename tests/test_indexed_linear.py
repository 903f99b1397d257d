"""indexed_linear and its layout: every ISA, panel, block and number of tokens against float64; uneven rows on one, two
and three threads; bad tensors."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import DTYPES, TOLERANCE, awkward, same_bits, weight_24, weight_unstructured

from pyfast import BitmapWeight, Sparse24Weight, _native, backends
from pyfast.ops.indexed_linear import indexed_linear
from pyfast.reference import indexed_linear as reference
from pyfast.reference.epilogue import ACTIVATIONS, epilogue
from pyfast.sparse.layouts import IndexedLayout, block_columns, panel_rows

OPS = torch.ops.pyfast
KINDS = [(dtype, False) for dtype in DTYPES] + [(torch.bfloat16, True)]  # dtype, whether entries are pairs
each_kind = pytest.mark.parametrize(("dtype", "pairs"), KINDS)
ONE_AND_TWO = [(torch.float32, False), (torch.bfloat16, True)]
one_and_two = pytest.mark.parametrize(("dtype", "pairs"), ONE_AND_TWO)


def layout(dense, format="bitmap", panel=32, block=128, pairs=False):
    """values, columns, starts, rows of a dense matrix."""
    n, k = dense.shape
    if format == "2:4":
        weight = Sparse24Weight.from_dense(dense)
        return OPS.sparse24_to_indexed(weight.values, weight.metadata, None, k, panel, block, pairs)
    weight = BitmapWeight.from_dense(dense)
    return OPS.bitmap_to_indexed(weight.values, weight.bitmaps, weight.offsets, None, n, k, panel, block, pairs)


def check(x, dense, made, panel, block, bias=None):
    y = indexed_linear(x, *made, bias, dense.shape[0], panel, block, 0, None)
    true = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    assert y.shape == true.shape and y.dtype == x.dtype
    scale = x.double().abs() @ dense.double().abs().T + (0 if bias is None else bias.double().abs())
    assert float((y.double() - true).norm()) <= TOLERANCE[x.dtype] * float(scale.norm().clamp(min=1e-30))


@settings(max_examples=50, deadline=None)
@given(
    format=st.sampled_from(["bitmap", "2:4"]),
    n=st.integers(1, 150),
    k=st.integers(1, 600),
    tokens=st.integers(0, 140),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    kind=st.sampled_from(KINDS),
    panel=st.sampled_from([16, 32, 48, 256]),
    block=st.sampled_from([64, 128, 192]),
    variant=st.sampled_from(backends.isas_supported() or ["serial"]),
)
def test_any_shape(format, n, k, tokens, sparsity, kind, panel, block, variant):
    dtype, pairs = kind
    dense = weight_24(n, k, dtype) if format == "2:4" else weight_unstructured(n, k, sparsity, dtype)
    made = layout(dense, format, panel, block, pairs)
    with backends.isa(variant):
        check(torch.randn(tokens, k).to(dtype), dense, made, panel, block, torch.randn(n).to(dtype))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("block", [64, 128, 192])
@each_kind
def test_one_token(isa, dtype, pairs, block, sparsity):
    """Lists of every length about 16 entries, the last ones at the end of the tensors."""
    for n, k in ((1, 1), (33, 500), (150, 1030)):
        dense = weight_unstructured(n, k, sparsity, dtype)
        made = layout(dense, "bitmap", 32, block, pairs)
        check(torch.randn(1, k).to(dtype), dense, made, 32, block, torch.randn(n).to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 5, 16, 30, 70])
@pytest.mark.parametrize("block", [64, 128, 192])
@one_and_two
def test_an_activation_reaches_the_rows_that_store_its_column(isa, dtype, pairs, block, tokens, bad):
    """One that is no number, or infinite, spoils the outputs of those rows, no others, whatever fills up the quads."""
    dense = weight_unstructured(70, 300, 0.8, dtype)
    dense[::7] = 0.0
    x, made = torch.randn(tokens, 300).to(dtype), layout(dense, panel=48, block=block, pairs=pairs)
    clean = indexed_linear(x, *made, None, 70, 48, block, 0, None)
    for column in (0, 1, 63, 64, 127, 128, 130, 191, 192, 256, 299):
        dirty = x.clone()
        dirty[-1, column] = bad
        y = indexed_linear(dirty, *made, None, 70, 48, block, 0, None)
        stores = dense[:, column] != 0
        assert not y[-1, stores].isfinite().any()
        assert torch.equal(y[-1, ~stores], clean[-1, ~stores]) and torch.equal(y[:-1], clean[:-1])
        if bad == float("inf"):
            assert torch.equal(y[-1, stores], dense[stores, column].sign() * bad)


def by_hand(dense, panel, block, a_step=1):
    """The layout by its definition, for any block that the product takes; conversions make some of them. A step has
    ``a_step`` entries of a row."""
    n, k = dense.shape
    values, columns, starts, rows = [], [], [0], []
    for first_row in range(0, n, panel):
        for first in range(0, k, block):
            part = torch.zeros(panel, block)
            piece = dense[first_row : first_row + panel, first : first + block]
            part[: piece.shape[0], : piece.shape[1]] = piece
            order = (part != 0).sum(1).argsort(descending=True, stable=True).tolist()
            for quad in range(0, panel, 4):
                entries = [[(float(part[r, c]), c) for c in part[r].nonzero()[:, 0].tolist()] for r in order[quad:][:4]]
                steps = -(-max(map(len, entries)) // a_step)
                filled = [row + [(0.0, block)] * (a_step * steps - len(row)) for row in entries]
                of_steps = [[row[step * a_step :][:a_step] for row in filled] for step in range(steps)]
                values += [[[value for value, _ in some] for some in step] for step in of_steps]
                columns += [[[column for _, column in some] for some in step] for step in of_steps]
                starts.append(len(values))
                rows.append(order[quad:][:4])
    size = (-1, 4, a_step) if a_step > 1 else (-1, 4)
    return (
        torch.tensor(values, dtype=dense.dtype).reshape(size),
        torch.tensor(columns, dtype=torch.uint8).reshape(size),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(rows, dtype=torch.uint8),
    )


@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
@pytest.mark.parametrize(("panel", "block"), [(4, 1), (16, 17), (12, 33), (8, 65), (20, 97), (16, 129), (16, 192)])
@one_and_two
def test_any_block_and_panel(isa, dtype, pairs, tokens, panel, block):
    dense = weight_unstructured(29, 2 * block + 5, 0.4, dtype)
    made = by_hand(dense, panel, block, 2 if pairs else 1)
    check(torch.randn(tokens, dense.shape[1]).to(dtype), dense, made, panel, block)


@each_kind
@pytest.mark.parametrize("format", ["bitmap", "2:4"])
def test_the_layout_holds_the_weight_bit_for_bit(format, dtype, pairs):
    dense = weight_24(70, 200, dtype) if format == "2:4" else weight_unstructured(70, 200, 0.7, dtype)
    made = layout(dense, format, 32, 128, pairs)
    assert same_bits(reference.decompress(*made, 70, 200, 32, 128).to(dtype), dense)
    values, columns, starts, _ = made
    assert starts.diff().min() >= 0 and int(starts[-1]) == len(values) == len(columns)


def test_conversions_make_what_the_definition_says():
    """Of pairs; what single entries are is looked at below."""
    dense = weight_unstructured(90, 300, 0.8, torch.bfloat16)
    for one, other in zip(layout(dense, panel=48, pairs=True), by_hand(dense, 48, 128, 2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("n", "panel", "block"), [(16, 16, 128), (50, 16, 64), (200, 112, 192)])
def test_quads_hold_the_rows_of_a_panel_once_fullest_first(n, panel, block):
    """And a row's entries in the order of its columns; what fills up a quad stands behind them, at no column."""
    dense = weight_unstructured(n, 300, 0.8)
    values, columns, starts, rows = layout(dense, panel=panel, block=block)
    blocks = -(-300 // block)
    for part, order in enumerate(rows.view(-1, panel)):
        assert torch.equal(order.sort().values, torch.arange(panel, dtype=torch.uint8))
        lengths = []
        for place, row in enumerate(order.tolist()):
            quad = part * panel // 4 + place // 4
            at = columns[starts[quad] : starts[quad + 1], place % 4].int()
            stored = at[at < block]
            assert (stored.diff() > 0).all()
            assert (at[len(stored) :] == block).all()
            assert not values[starts[quad] : starts[quad + 1], place % 4][len(stored) :].any()
            whole = part // blocks * panel + row
            here = dense[whole : whole + 1, part % blocks * block :][:, :block]
            assert torch.equal(stored.long(), here.nonzero()[:, 1])
            lengths.append(len(stored))
        assert lengths == sorted(lengths, reverse=True)
        steps = starts[part * panel // 4 : (part + 1) * panel // 4 + 1].diff().tolist()
        assert steps == lengths[::4]  # no longer than the fullest row of the quad


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
@each_kind
def test_epilogue(isa, dtype, pairs, activation):
    dense, x = weight_unstructured(40, 100, 0.6, dtype), torch.randn(9, 100).to(dtype)
    bias, mul = torch.randn(40).to(dtype), torch.randn(9, 80).to(dtype)[:, ::2]
    y = indexed_linear(x, *layout(dense, pairs=pairs), bias, 40, 32, 128, activation, mul)
    true = epilogue(x.double() @ dense.double().T + bias.double(), activation, mul.double())
    assert relative_error(y, true) < 3 * TOLERANCE[dtype]


@one_and_two
@pytest.mark.parametrize("tokens", [1, 7, 20, 33, 70])
def test_nan_and_infinity_stay_in_their_token_and_their_row(isa, tokens, dtype, pairs):
    dense = weight_unstructured(48, 130, 0.5, dtype)
    x = torch.randn(tokens, 130).to(dtype)
    clean = indexed_linear(x, *layout(dense, pairs=pairs), None, 48, 32, 128, 0, None)
    dirty = x.clone()
    dirty[tokens - 1] = float("nan")
    y = indexed_linear(dirty, *layout(dense, pairs=pairs), None, 48, 32, 128, 0, None)
    stored = (dense != 0).any(1)
    assert torch.equal(y[: tokens - 1], clean[: tokens - 1]) and y[tokens - 1, stored].isnan().all()
    for bad in (float("nan"), float("inf")):
        dense[17, int(dense[17].nonzero()[0])] = bad
        y = indexed_linear(x, *layout(dense, pairs=pairs), None, 48, 32, 128, 0, None)
        others = torch.arange(48) != 17
        assert torch.equal(y[:, others], clean[:, others]) and not torch.isfinite(y[:, 17]).any()


@pytest.mark.parametrize(("dtype", "pairs"), [*ONE_AND_TWO, (torch.bfloat16, False)])
def test_awkward_values(isa, dtype, pairs):
    """Full and empty rows, −0.0, NaN, infinities, subnormals: as the dense product where that is finite."""
    dense = awkward(40, 300, dtype)
    x = torch.rand(20, 300).to(dtype) + 1
    y = indexed_linear(x, *layout(dense, panel=16, block=192, pairs=pairs), None, 40, 16, 192, 0, None)
    true = x.double() @ dense.double().T
    finite = torch.isfinite(true)
    assert torch.equal(torch.isfinite(y), finite)
    assert torch.equal(y.isnan(), true.isnan())
    assert relative_error(y[finite], true[finite]) < 3 * TOLERANCE[dtype]


def uneven(case, n=300, k=700):
    dense = torch.zeros(n, k)
    if case == "one full row":
        dense[n // 2] = torch.randn(k)
    elif case == "first half empty":
        dense[n // 2 :] = weight_unstructured(n - n // 2, k, 0.5)
    elif case == "one element":
        dense[n - 1, k - 1] = 2.0
    elif case == "one full column":
        dense[:, 3] = torch.randn(n)
    return dense


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", ["one full row", "first half empty", "one element", "one full column", "empty"])
def test_uneven_rows_on_any_number_of_threads(case, threads):
    """Work is handed out in small pieces to whoever is free, so rows may differ as they like."""
    dense = uneven(case)
    weight = BitmapWeight.from_dense(dense)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 4, 16, 130):
            x = torch.randn(tokens, 700)
            true = x.double() @ dense.double().T
            direct = OPS.bitmap_linear(x, weight.values, weight.bitmaps, weight.offsets, None, None, 300, 0, None)
            indexed = IndexedLayout.of(weight).linear(x, None, 0, None)
            for y in (direct, indexed):
                assert torch.equal(y[:, (dense == 0).all(1)], torch.zeros(tokens, int((dense == 0).all(1).sum())))
                assert float((y.double() - true).norm()) <= 2e-6 * float(true.norm())
    finally:
        torch.set_num_threads(before)


@each_kind
def test_opcheck(dtype, pairs):
    dense = weight_unstructured(40, 150, 0.6, dtype)
    weight, two_four = BitmapWeight.from_dense(dense), Sparse24Weight.from_dense(weight_24(40, 150, dtype))
    x, bias, mul = torch.randn(5, 150).to(dtype), torch.randn(40).to(dtype), torch.randn(5, 40).to(dtype)
    torch.library.opcheck(OPS.indexed_linear, (x, *layout(dense, pairs=pairs), bias, 40, 32, 128, 4, mul))
    arguments = (weight.values, weight.bitmaps, weight.offsets, None, 40, 150, 32, 128, pairs)
    torch.library.opcheck(OPS.bitmap_to_indexed, arguments)
    torch.library.opcheck(OPS.sparse24_to_indexed, (two_four.values, two_four.metadata, None, 150, 32, 128, pairs))


@one_and_two
def test_reference_agrees(dtype, pairs):
    dense, x = weight_unstructured(33, 130, 0.6, dtype), torch.randn(5, 130).to(dtype)
    y = indexed_linear(x, *layout(dense, pairs=pairs), None, 33, 32, 128, 0, None, "reference")
    assert relative_error(y, x.double() @ dense.double().T) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.randn(150)}),
        ("x", {"x": torch.randn(3, 150).double()}),
        ("columns", {"values": torch.zeros(2, 4)}),
        ("values", {"values": torch.zeros(2, 4), "columns": torch.zeros(2, 4, dtype=torch.uint8)}),
        ("values", {"values": torch.zeros(8)}),
        ("values", {"values": torch.zeros(0, 4, dtype=torch.float64)}),
        ("columns", {"columns": torch.zeros(1, 4, dtype=torch.uint8)}),
        ("starts", {"starts": torch.zeros(5, dtype=torch.int32)}),
        ("starts", {"starts": torch.zeros(33, dtype=torch.int64)}),
        ("rows", {"rows": torch.zeros(31, 4, dtype=torch.uint8)}),
        ("rows", {"rows": torch.zeros(32, 4, dtype=torch.int8)}),
        ("bias", {"bias": torch.randn(39)}),
        ("panel, block", {"panel": 0}),
        ("panel, block", {"panel": 30}),
        ("panel, block", {"panel": 260}),
        ("panel, block", {"block": 256}),
        ("activation", {"activation": 5}),
        ("mul", {"mul": torch.randn(3, 39)}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, change):
    made = dict(zip(("values", "columns", "starts", "rows"), layout(weight_unstructured(40, 150, 0.6)), strict=True))
    rest = {"bias": None, "n": 40, "panel": 32, "block": 128, "activation": 0, "mul": None}
    arguments = {"x": torch.randn(3, 150), **made, **rest, **change}
    with pytest.raises(RuntimeError, match=name):
        OPS.indexed_linear(*arguments.values())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.randn(3, 150)}),
        ("x", {"x": torch.randn(3, 150).half()}),
        ("values", {"values": torch.zeros(0, 4, dtype=torch.bfloat16)}),
        ("values", {"values": torch.zeros(0, 4, 1, dtype=torch.bfloat16)}),
        ("columns", {"columns": torch.zeros(0, 8, dtype=torch.uint8)}),
        ("columns", {"columns": torch.zeros(1, 4, 2, dtype=torch.uint8)}),
    ],
)
def test_pairs_that_do_not_fit_are_refused(name, change):
    dense = weight_unstructured(40, 150, 0.6, torch.bfloat16)
    made = dict(zip(("values", "columns", "starts", "rows"), layout(dense, pairs=True), strict=True))
    rest = {"bias": None, "n": 40, "panel": 32, "block": 128, "activation": 0, "mul": None}
    arguments = {"x": torch.randn(3, 150).bfloat16(), **made, **rest, **change}
    with pytest.raises(RuntimeError, match=name):
        OPS.indexed_linear(*arguments.values())


@pytest.mark.parametrize("format", ["bitmap", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_bfloat16_makes_pairs(dtype, format):
    with pytest.raises(RuntimeError, match="pairs"):
        layout(weight_24(40, 150, dtype), format, pairs=True)


@pytest.mark.parametrize(("panel", "block"), [(0, 128), (24, 128), (272, 128), (32, 0), (32, 100), (32, 256)])
def test_panels_and_blocks_that_cannot_be_are_refused(panel, block):
    with pytest.raises(RuntimeError, match="panel" if block == 128 else "block"):
        layout(weight_unstructured(40, 150, 0.6), "bitmap", panel, block)
    with pytest.raises(RuntimeError, match="panel" if block == 128 else "block"):
        layout(weight_24(40, 150), "2:4", panel, block)


def test_panels_shrink_so_that_threads_share_evenly():
    assert panel_rows(14336, 2) == panel_rows(4096, 2) == 256 and panel_rows(4864, 8) == panel_rows(100, 8) == 64
    assert all(panel_rows(n, 3) % 16 == 0 for n in range(1, 20000, 97))
    assert block_columns(0.5) == 128 and block_columns(0.05) == 192


def test_a_layout_holds_pairs_where_the_machine_multiplies_them(isa):
    """And serves on every ISA, whichever it was made on."""
    dense, x = weight_unstructured(100, 300, 0.6, torch.bfloat16), torch.randn(40, 300).bfloat16()
    made = IndexedLayout.of(BitmapWeight.from_dense(dense))
    paired = isa == "avx512" and _native.CPU.has_avx512_bf16()
    assert made.values.dtype == (torch.bfloat16 if paired else torch.float32)
    assert made.values.shape == made.columns.shape
    for variant in backends.isas_supported():
        with backends.isa(variant):
            y = made.linear(x, None, 0, None)
            assert relative_error(y, x.double() @ dense.double().T) < TOLERANCE[torch.bfloat16]
