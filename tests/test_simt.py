"""tests/simt executes CUDA kernels rightly, and a kernel that breaks a rule of the machine fails.

The kernels are those of ``tests/simt/selftest.cuh``. A mutant is the same kernel with one change; it must fail in every
order of lanes and blocks, which is what makes the check worth having.
"""

from __future__ import annotations

import numpy as np
import pytest
from simt import host

PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
FORMATS = ["bf16", "f16"]


@pytest.fixture(scope="module")
def library() -> host.Library:
    return host.build("selftest")


def sparse_case(kind: str, k: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The inputs of sparse_product (values, metadata, b) and the float64 product. Every legal pair occurs."""
    rng = np.random.default_rng(0)
    values = host.bits_from_float(rng.standard_normal((16, 16)), kind)
    b = host.bits_from_float(rng.standard_normal((k, 8)), kind)
    dense = np.zeros((16, 32))
    metadata = np.zeros((16, 2), np.uint16)
    for row in range(16):
        for group in range(8):
            first, second = PAIRS[(row * 8 + group) % 6 if row < 4 else rng.integers(6)]
            dense[row, 4 * group + first], dense[row, 4 * group + second] = host.float_from_bits(
                values[row, 2 * group : 2 * group + 2], kind
            )
            metadata[row, group // 4] |= (first | second << 2) << 4 * (group % 4)
    return [values, metadata, b], dense[:, :k] @ host.float_from_bits(b, kind)


def run_sparse(library: host.Library, kind: str = "bf16", k: int = 29, selector: int = 0, order: int = 0) -> float:
    """Relative error of sparse_product."""
    inputs, truth = sparse_case(kind, k)
    out = host.Output((16, 8), np.float32)
    library.run("sparse_product", *inputs, out, k, int(kind == "bf16"), selector, order=order)
    return np.linalg.norm(out.array - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("order", host.ORDERS)
@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("kind", FORMATS)
def test_mma_sp_with_ordered_metadata(library: host.Library, kind: str, selector: int, order: int) -> None:
    for k in (32, 29, 1):
        assert run_sparse(library, kind, k, selector, order) < 1e-6


@pytest.mark.parametrize("kind", FORMATS)
def test_mma_and_ldmatrix(library: host.Library, kind: str) -> None:
    rng = np.random.default_rng(1)
    a, bt = (host.bits_from_float(rng.standard_normal(shape), kind) for shape in ((16, 16), (8, 16)))
    out = host.Output((16, 8), np.float32)
    library.run("dense_product", a, bt, out, int(kind == "bf16"))
    truth = host.float_from_bits(a, kind) @ host.float_from_bits(bt, kind).T
    np.testing.assert_allclose(out.array, truth, rtol=1e-5, atol=1e-5)


def run_sums(library: host.Library, order: int = 0) -> tuple[np.ndarray, ...]:
    numbers = np.arange(3 * 64, dtype=np.float32) / 8
    sums, mean = host.Output(3, np.float32), host.Output(1, np.float32)
    total, counter = host.InOut(np.zeros(1, np.float32)), host.InOut(np.zeros(1, np.uint32))
    library.run("block_sums", numbers, sums, total, counter, mean, 3, 64, order=order)
    return sums.array, total.array, counter.array, mean.array


@pytest.mark.parametrize("order", host.ORDERS)
def test_barriers_atomics_and_tickets(library: host.Library, order: int) -> None:
    truth = (np.arange(3 * 64) / 8).reshape(3, 64).sum(1)
    sums, total, counter, mean = run_sums(library, order)
    np.testing.assert_array_equal(sums, truth)
    assert (total[0], counter[0], mean[0]) == (truth.sum(), 0, truth.mean())


def test_shuffles_votes_and_numbers(library: host.Library) -> None:
    words = np.random.default_rng(2).integers(0, 2**32, 32, dtype=np.uint32)
    out = host.Output((10, 32), np.uint32)
    library.run("warp_scan", words, out)
    odd = words & 1
    inclusive = np.cumsum(odd)
    following = np.append(words[1:], words[31])
    population = np.array([int(word).bit_count() for word in words])
    np.testing.assert_array_equal(out.array[0], inclusive - odd + 100 * inclusive)
    assert (out.array[1] == 1).all()
    np.testing.assert_array_equal(out.array[2], (words & 0xFFFF) | (following & 0xFFFF0000))
    np.testing.assert_array_equal(out.array[3], 3 + population + 10)
    np.testing.assert_array_equal(out.array[4], 2 * population)
    np.testing.assert_array_equal(out.array[5], [int(word | 1).bit_length() - 1 for word in words])
    both = following.astype(np.uint64) << 32 | words
    np.testing.assert_array_equal(out.array[6], (both >> np.arange(32, dtype=np.uint64)).astype(np.uint32))
    np.testing.assert_array_equal(out.array[7].view(np.uint16).reshape(8, 8), words.view(np.uint16).reshape(8, 8).T)
    lanes = np.arange(32)
    pairs = np.stack([np.maximum(lanes, 5.0), -np.minimum(lanes, 5.0)], 1).astype(np.float16)
    np.testing.assert_array_equal(out.array[8], pairs.view(np.uint32)[:, 0])
    np.testing.assert_array_equal(out.array[9], np.clip(lanes - 8, 0, 8))


def test_marked_pairs_and_sums_of_products(library: host.Library) -> None:
    rng = np.random.default_rng(4)
    words = rng.integers(0, 2**32, 32, dtype=np.uint32)
    values = rng.integers(0, 2**16, (32, 8), dtype=np.uint16)
    out = host.Output((8, 32), np.uint32)
    library.run("marked_pairs", words, values, out)
    marked = (words[:, None] >> np.arange(8, 16, dtype=np.uint32) & 1) == 1
    taken = np.where(marked, np.take_along_axis(values, np.cumsum(marked, 1) - marked, 1), 0)
    np.testing.assert_array_equal(out.array[:4], np.ascontiguousarray(taken.astype(np.uint16)).view(np.uint32).T)
    parts = words.view(np.uint8).reshape(32, 4).astype(np.uint32), words.view(np.uint16).reshape(32, 2)
    np.testing.assert_array_equal(out.array[4], 7 + parts[0] @ np.array([1, 2, 3, 4], np.uint32))
    np.testing.assert_array_equal(out.array[5], 7 + parts[1].astype(np.uint32) @ np.array([3, 5], np.uint32))
    for row, by in ((6, 1), (7, 16)):
        below = np.append(np.zeros(by, np.uint32), words[:-by])
        np.testing.assert_array_equal(out.array[row], words + below)


def run_address(library: host.Library, order: int = 0) -> tuple[np.ndarray, np.ndarray]:
    words = np.random.default_rng(4).integers(0, 2**32, 64, dtype=np.uint32)
    out = host.Output((2, 5, 32), np.uint32)
    library.run("by_address", words, out, order=order)
    np.testing.assert_array_equal(out.array[0], out.array[1])
    return words, out.array[0]


def test_shared_memory_by_address(library: host.Library) -> None:
    words, out = run_address(library)
    lanes = np.arange(32)
    weighted = words[:32].view(np.uint8).reshape(32, 4) @ np.array([1, 2, 3, 4])
    np.testing.assert_array_equal(out[0], weighted + lanes)
    np.testing.assert_array_equal(out[1], words[:31:-1])
    np.testing.assert_array_equal(out[2], np.bitwise_xor.reduce(words.reshape(32, 2), 1)[::-1])
    np.testing.assert_array_equal(out[3], np.tile(np.bitwise_xor.reduce(words.reshape(16, 4), 1)[::-1], 2))
    np.testing.assert_array_equal(out[4], 1 + lanes % 2 * 2 * lanes)


def run_rows(library: host.Library, order: int = 0, rows: int = 7) -> bool:
    words = np.random.default_rng(3).integers(0, 2**32, (rows, 32), dtype=np.uint32)
    out = host.Output(words.shape, np.uint32)
    library.run("reversed_rows", words, out, rows, order=order)
    return np.array_equal(out.array, words[:, ::-1])


@pytest.mark.parametrize("order", host.ORDERS)
def test_cp_async_in_stages(library: host.Library, order: int) -> None:
    assert all(run_rows(library, order, rows) for rows in (1, 2, 3, 9))


def run_cluster(library: host.Library, order: int = 0, cluster: int = 4) -> np.ndarray:
    out = host.InOut(np.zeros(8, np.float32))
    library.run("cluster_sums", np.arange(8, dtype=np.float32), out, 8, cluster, order=order)
    return out.array


@pytest.mark.parametrize("order", host.ORDERS)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_clusters(library: host.Library, cluster: int, order: int) -> None:
    numbers = np.arange(8.0).reshape(-1, cluster)
    sums = 2 * (numbers * (np.arange(cluster) + 1)).sum(1, keepdims=True)
    np.testing.assert_array_equal(
        run_cluster(library, order, cluster).reshape(-1, cluster), np.tile(1001 * sums, cluster)
    )


# What is broken, the run that shows it, the text in selftest.cuh, what stands there instead, what the failure says.
MUTANTS = {
    "an address without whose memory it is": (
        run_address,
        "begin = ptx::shared_address(bytes)",
        "begin = ptx::shared_address(bytes) & 0xffffff",
        "outside|may not have begun|exited",
    ),
    "an address from the beginning of all shared memory": (
        run_address,
        "begin = ptx::shared_address(bytes)",
        "begin = ptx::shared_address(bytes) & ~0xfffu",
        "outside",
    ),
    "missing barrier": (
        run_sums,
        "partial[thread / 32] = sum;\n  ptx::syncthreads();",
        "partial[thread / 32] = sum;",
        "no barrier after the write|nobody has written",
    ),
    "missing barrier after a ticket": (
        run_sums,
        "gridDim.x);\n  }\n  ptx::syncthreads();",
        "gridDim.x);\n  }",
        "no barrier after|nobody has written",
    ),
    "missing ticket": (
        run_sums,
        "number = ptx::atomic_ticket(counter, gridDim.x);",
        "number = counter == nullptr ? 0 : blockIdx.x;",
        "no barrier after the write|nobody has written",
    ),
    "missing warp barrier": (
        run_sparse,
        "ptx::syncwarp();\n\n",
        "\n",
        "no barrier after the write|has not been waited for|nobody has written",
    ),
    "stage refilled while it is read": (
        run_rows,
        "ptx::syncwarp();\n    fetch(row + Stages - 1);\n    to[",
        "fetch(row + Stages - 1);\n    ptx::syncwarp();\n    to[",
        "no barrier after the read|has not been waited for",
    ),
    "read past the end": (
        run_sums,
        "numbers[blockIdx.x * blockDim.x + threadIdx.x]",
        "numbers[blockIdx.x * blockDim.x + threadIdx.x + 1]",
        "reads 4 bytes outside all memory: 0 bytes past the end",
    ),
    "write outside the tile": (
        run_sparse,
        "word);\n  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8)",
        "word);\n  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 9)",
        "writes 4 bytes outside all memory",
    ),
    "write to an input": (
        run_sums,
        "sums[blockIdx.x] = sum;",
        "const_cast<float*>(numbers)[0] = sum;",
        "which is an input",
    ),
    "read of unwritten memory": (
        run_sparse,
        "ptx::cp_async<16>(rows[lane], b + (lane < k ? lane * 8 : 0), lane < k);",
        "if (lane < k) ptx::cp_async<16>(rows[lane], b + lane * 8);",
        "which nobody has written",
    ),
    "cp.async without a wait": (
        run_sparse,
        "ptx::cp_async_wait<0>();\n  ptx::syncwarp();",
        "ptx::syncwarp();",
        "has not been waited for",
    ),
    "cp.async waited for a stage late": (
        run_rows,
        "cp_async_wait<Stages - 2>",
        "cp_async_wait<Stages - 1>",
        "has not been waited for",
    ),
    "cp.async from shared memory": (
        run_rows,
        "from + row * 32 + lane);",
        "from != nullptr ? &ring[row % Stages][31 - lane] : from);",
        "outside all memory that is global",
    ),
    "misaligned load": (
        run_sparse,
        "16 + 2 * t + i / 2 * 8",
        "16 + 2 * t + 1 + i / 2 * 7",
        "not a multiple of the size",
    ),
    "divergence at a barrier": (
        run_sums,
        "  ptx::syncthreads();\n  if (thread == 0) {",
        "  if (thread < 40) ptx::syncthreads();\n  if (thread == 0) {",
        "syncthreads",
    ),
    "divergence in a warp": (
        run_sums,
        "sum += ptx::shfl_xor(sum, by);",
        "if (lane != 7) sum += ptx::shfl_xor(sum, by);",
        "shfl_xor",
    ),
    "shared memory past its end": (
        run_rows,
        "[31 - lane]",
        "[32 - lane]",
        "past its end|no barrier after|has not been waited for|nobody has written|outside all memory",
    ),
    "cluster exit too early": (
        run_cluster,
        "  ptx::cluster_sync_relaxed();\n  if (threadIdx.x == 0) out",
        "  if (threadIdx.x == 0) out",
        "cluster|exited|nobody has written|no barrier",
    ),
    "cluster read before the other block began": (
        run_cluster,
        "own = numbers[blockIdx.x];\n  ptx::cluster_sync();",
        "own = numbers[blockIdx.x];",
        "before the first cluster_sync|may not have begun|nobody",
    ),
    "memory touched while the grid before may run": (
        run_address,
        "  ptx::prefetch_l2(words);\n  ptx::wait_prerequisites();\n",
        "  if (words[lane] == 0) out[lane] = 0;\n  ptx::wait_prerequisites();\n",
        "before wait_prerequisites",
    ),
    "an exit while the grid before may run": (
        run_address,
        "  ptx::wait_prerequisites();\n",
        "  if (lane == 5) return;\n  ptx::wait_prerequisites();\n",
        "exits before wait_prerequisites",
    ),
    "a load that may move before the wait": (
        run_address,
        "ptx::ld_global(words + lane)",
        "ptx::ld_nc(words + lane)",
        "ld_nc after launch_dependents",
    ),
    "wrong metadata selector": (
        run_sparse,
        "<T, Selector>(sums, a_words",
        "<T, 1 - Selector>(sums, a_words",
        "is none of 4, 8, 9, C, D, E",
    ),
}

# Mutants that break no rule and give wrong numbers.
WRONG = {
    "wrong fragment of a": (
        run_sparse,
        "(g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8",
        "(g + i / 2 * 8) * 16 + 2 * t + i % 2 * 8",
    ),
    "wrong fragment of b": (
        run_sparse,
        "ldmatrix<4, true>(b_words, rows[lane]",
        "ldmatrix<4, false>(b_words, rows[lane]",
    ),
    "rows of the metadata exchanged": (
        run_sparse,
        "metadata[g * 2 + half] | static_cast<uint32_t>(metadata[(g + 8)",
        "metadata[(g + 8) * 2 + half] | static_cast<uint32_t>(metadata[g",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_fails(name: str) -> None:
    run, old, new, message = MUTANTS[name]
    library = host.build("selftest", {("selftest.cuh", old): new})
    for order in host.ORDERS:
        with pytest.raises(host.SimtError, match=message):
            run(library, order=order)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_fragment_gives_wrong_numbers(name: str) -> None:
    run, old, new = WRONG[name]
    assert run(host.build("selftest", {("selftest.cuh", old): new})) > 0.1
