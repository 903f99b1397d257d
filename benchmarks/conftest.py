"""Feeds the cases of ``pyfast.bench`` to pytest-benchmark, one test an implementation, grouped by case.

A module here names its cases in ``CASES``, functions from options to a list of cases. Quick shapes are the
default; ``--full`` takes those of ``pyfast bench``, ``--bench-device cuda`` the GPU. Unlike ``pyfast
bench``, pytest-benchmark times one implementation after the other, so that a drift of the machine does not
meet them alike.
"""

from __future__ import annotations

import pytest

from pyfast.bench.options import DEVICES, Options


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the full shapes of pyfast bench")
    parser.addoption("--bench-device", choices=DEVICES, default="cpu")


def pytest_generate_tests(metafunc):
    if "implementation" not in metafunc.fixturenames:
        return
    config = metafunc.config
    options = Options(device=config.getoption("--bench-device"), quick=not config.getoption("--full"))
    pairs = [
        (case, name) for list_cases in metafunc.module.CASES for case in list_cases(options) for name in case.names
    ]
    ids = [f"{case.id}-{name.replace(' ', '-')}" for case, name in pairs]
    metafunc.parametrize(("case", "name"), pairs, ids=ids)


@pytest.fixture(scope="session")
def built():
    """The implementations of the case built last: those of one case follow each other, and memory is
    finite."""
    return {}


@pytest.fixture
def implementation(case, name, built, benchmark):
    """The implementation ``name`` of ``case``, its data built and itself run once."""
    if case.id not in built:
        built.clear()
        built[case.id] = case.implementations()
    if name not in built[case.id]:
        pytest.skip(f"{name} cannot run here")
    benchmark.group = case.id
    return built[case.id][name]
