"""What the tests share: every ISA this machine runs, one thread, relative errors, and offline transformers."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYFAST_CACHE_DIR"] = "none"  # no test goes by what was measured on this machine
if "PYTEST_XDIST_WORKER" in os.environ:  # another worker needs the processors on which threads would wait for work
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import Tensor

from pyfast import backends
from pyfast.bench.progress import Progress


@pytest.fixture(params=["serial", "avx2", "avx512"])
def isa(request):
    """Runs the test once with each ISA of the native kernels."""
    if request.param not in backends.isas_supported():
        pytest.skip(f"this processor cannot run {request.param}")
    with backends.isa(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """Threads cost tiny models more than they bring, all the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quiet():
    return Progress(quiet=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖ in float64; NaN where got holds NaN."""
    truth = truth.detach().double()
    return float((got.detach().double() - truth).norm() / truth.norm().clamp(min=1e-300))
