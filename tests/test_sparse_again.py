"""A product that is asked for again is served without looking at everything once more: whatever may have changed since
must be seen all the same."""

from __future__ import annotations

import gc
import importlib
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import relative_error
from sparse_cases import DTYPES, weight_24, weight_unstructured
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast import BitmapWeight, Sparse24Weight, backends, sparse, sparse_linear
from pyfast.sparse import remembered as remembered_module

N, K = 96, 192


def weight(format="bitmap", dtype=torch.float32, sparsity=0.9):
    if format == "2:4":
        return Sparse24Weight.from_dense(weight_24(N, K, dtype))
    return BitmapWeight.from_dense(weight_unstructured(N, K, sparsity, dtype))


def last(container):
    return container._layouts.last


def remembered(container, x, bias=None, activation=None, mul=None):
    """Whether this call would be served as the one before."""
    call = last(container)
    with torch.no_grad():
        like = call is not None and call.is_like(x, container, bias, activation, mul)
        return like and call.again(x, mul) is not None


def true(x, container, bias=None):
    y = x.double() @ container.to_dense().double().T
    return y if bias is None else y + bias.double()


@pytest.fixture(params=["direct", "indexed"])
def kernel(request, monkeypatch):
    """Plans that choose this kernel."""
    monkeypatch.setattr("pyfast.sparse.linear.choose", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["bitmap", "2:4"])
@pytest.mark.parametrize("shape", [(3, K), (2, 3, K), (K,), (1, 1, K)])
def test_another_x_of_the_same_shape(kernel, format, dtype, shape):
    container, bias = weight(format, dtype), torch.randn(N).to(dtype)
    with torch.no_grad():
        for i in range(3):
            x = torch.randn(shape).to(dtype)
            assert i == 0 or remembered(container, x, bias, "relu")
            y = sparse_linear(x, container, bias, activation="relu")
            expected = true(x, container, bias).relu()
            assert y.shape == expected.shape and y.dtype == dtype
            assert relative_error(y, expected) < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def test_int8(kernel):
    container = weight().quantize()
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, K)
            assert relative_error(sparse_linear(x, container), true(x, container)) < 1e-5
        assert remembered(container, x)
        half = sparse_linear(x.half(), container)  # the values say nothing of x's dtype
    assert half.dtype == torch.float16


def test_x_that_is_not_contiguous(kernel):
    container = weight()
    with torch.no_grad():
        sparse_linear(torch.randn(4, K), container)
        wide = torch.randn(K, 4).T
        assert remembered(container, wide)
        assert relative_error(sparse_linear(wide, container), true(wide, container)) < 1e-5
        wide = torch.randn(2, K, 3).transpose(1, 2)
        for _ in range(2):
            assert relative_error(sparse_linear(wide, container), true(wide, container)) < 1e-5


def test_what_is_different_is_not_the_same_call(kernel):
    container, bias, x = weight(), torch.randn(N), torch.randn(3, K)
    with torch.no_grad():
        sparse_linear(x, container, bias)
    assert remembered(container, x, bias) and remembered(container, torch.randn(3, K), bias)
    for other in (
        (torch.randn(2, K), bias),
        (torch.randn(1, 3, K), bias),
        (x.double(), bias),
        (x, None),
        (x, bias.clone()),
        (x, bias, "silu"),
        (torch.nn.Parameter(x), bias),
        (x.to("meta"), bias),
        ("x", bias),
    ):
        assert not remembered(container, *other)
    assert not last(container).is_like(x, container, bias, None, None)  # gradients are on


def test_bad_input_is_refused_after_a_good_call(kernel):
    container, x = weight(), torch.randn(3, K)
    with torch.no_grad():
        sparse_linear(x, container)
        with pytest.raises(ValueError, match="x"):
            sparse_linear(torch.randn(3, K + 1), container)
        with pytest.raises(TypeError, match="x"):
            sparse_linear(x.double(), container)
        with pytest.raises(ValueError, match="bias"):
            sparse_linear(x, container, torch.randn(N + 1))
        with pytest.raises(ValueError, match="activation"):
            sparse_linear(x, container, activation="tanh")
        with pytest.raises(TypeError, match="weight"):
            sparse_linear(x, torch.randn(N, K))


@pytest.mark.parametrize("change", ["in place", "data", "replaced", "pattern"])
def test_changes_of_the_weight_are_seen(kernel, change):
    container, x = weight(), torch.randn(3, K)
    with torch.no_grad():
        for _ in range(2):
            sparse_linear(x, container)
        if change == "in place":
            container.values.mul_(2)
        elif change == "data":
            container.values.data = container.values * 2
        elif change == "replaced":
            container.values = container.values * 2
        else:
            other = weight()
            container.values, container.bitmaps, container.offsets = other.values, other.bitmaps, other.offsets
        # What is read as it is stored is read as it is now.
        assert remembered(container, x) == (kernel == "direct" and change == "in place")
        for i in range(3):
            assert relative_error(sparse_linear(x, container), true(x, container)) < 1e-5
            if i == 0 and kernel == "indexed":
                assert last(container) is None  # nor is the memory of the old layout kept


def test_gradients_come_after_calls_without(kernel):
    container, x = weight(), torch.randn(3, K)
    with torch.no_grad():
        sparse_linear(x, container)
    leaf = x.clone().requires_grad_()
    sparse_linear(leaf, container).sum().backward()
    assert relative_error(leaf.grad, container.to_dense().sum(0).expand(3, K)) < 1e-5
    container.values.requires_grad_()
    sparse_linear(x, container).sum().backward()
    assert container.values.grad is not None and container.values.grad.shape == container.values.shape


def test_an_optimizer_step_is_seen(kernel):
    container = weight()
    values = container.values = torch.nn.Parameter(container.values)
    x = torch.randn(3, K)
    with torch.no_grad():
        sparse_linear(x, container)
    optimizer = torch.optim.SGD([values], lr=1.0)
    values.grad = torch.ones_like(values)
    optimizer.step()
    assert remembered(container, x) == (kernel == "direct")
    with torch.no_grad():
        assert relative_error(sparse_linear(x, container), true(x, container)) < 1e-5


def test_what_choices_depend_on(kernel):
    """The ISA, the number of threads, the policy of layouts."""
    container, x = weight(), torch.randn(3, K)

    def serve():
        with torch.no_grad():
            sparse_linear(x, container)
        assert remembered(container, x)

    serve()
    with backends.isa("serial"):
        assert not remembered(container, x)
        serve()
    assert not remembered(container, x)
    serve()
    turned = torch.randn(K, 3).T  # goes by the operator
    assert remembered(container, turned)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert not remembered(container, x) and not remembered(container, turned)
    torch.set_num_threads(before)
    serve()
    policy = sparse.set_layouts("none")
    assert not remembered(container, x)
    sparse.set_layouts(policy)


def test_dropped_layouts_are_not_kept_alive(monkeypatch):
    monkeypatch.setattr("pyfast.sparse.linear.choose", lambda *_: "indexed")
    container = weight()
    with torch.no_grad():
        sparse_linear(torch.randn(3, K), container)
    assert last(container) is not None
    sparse.drop_layouts(container)
    assert last(container) is None


def test_tensors_of_inference_mode_are_not_remembered(kernel):
    with torch.inference_mode():
        container, x = weight(), torch.randn(3, K)
        for _ in range(2):
            assert relative_error(sparse_linear(x, container), true(x, container)) < 1e-5
    assert last(container) is None


def test_who_watches_the_operators_sees_the_weight_as_it_is_stored(kernel):
    """Under a dispatch mode, such as one that counts or fakes, no layout serves: it knows nothing of layouts."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    container, x, seen = weight(), torch.randn(3, K), []
    with torch.no_grad():
        sparse_linear(x, container)
        assert remembered(container, x)
        with Watch():
            sparse_linear(x, container)
            assert not last(container).is_like(x, container, None, None, None)
    assert torch.ops.pyfast.bitmap_linear.default in seen


def test_compiled_after_a_call(kernel):
    container, x = weight(), torch.randn(3, K)
    with torch.no_grad():
        y = sparse_linear(x, container)
        compiled = torch.compile(lambda x: sparse_linear(x, container), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, K), (2, 3, K), (K,)])
def test_with_the_other_branch_of_a_gated_mlp(kernel, dtype, shape):
    container = weight("bitmap", dtype)
    with torch.no_grad():
        for i in range(4):
            x, mul = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], N).to(dtype)
            if i == 3 and mul.dim() > 1:  # not contiguous: it is looked at as an operator does
                mul = torch.randn(*shape[:-1], 2 * N).to(dtype)[..., ::2]
            assert i == 0 or remembered(container, x, None, "silu", mul)
            assert i == 0 or not remembered(container, x, None, "silu")
            y = sparse_linear(x, container, activation="silu", mul=mul)
            expected = torch.nn.functional.silu(true(x, container)) * mul.double()
            assert relative_error(y, expected) < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        for other in (mul.double(), mul[..., 1:], mul.to("meta"), torch.nn.Parameter(mul)):
            assert not remembered(container, x, None, "silu", other)
        with pytest.raises(ValueError, match="mul"):
            sparse_linear(x, container, activation="silu", mul=mul[..., 1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_read_as_it_is_now(kernel, dtype):
    container, bias, x = weight("bitmap", dtype), torch.randn(N).to(dtype), torch.randn(3, K).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    with torch.no_grad():
        sparse_linear(x, container, bias)
        bias.mul_(-3)
        assert remembered(container, x, bias)
        assert relative_error(sparse_linear(x, container, bias), true(x, container, bias)) < tolerance
        bias.data = bias * 5
        assert not remembered(container, x, bias)
        assert relative_error(sparse_linear(x, container, bias), true(x, container, bias)) < tolerance
        bias.resize_(N - 1)  # where it lies
        with pytest.raises(ValueError, match="bias"):
            sparse_linear(x, container, bias)
        spread = torch.randn(2 * N).to(dtype)[::2]  # the kernels read a copy: it must not be kept
        for _ in range(3):
            assert relative_error(sparse_linear(x, container, spread), true(x, container, spread)) < tolerance
            spread.add_(1)


def test_profilers_see_the_operator(kernel):
    container, x = weight(), torch.randn(3, K)
    with torch.no_grad():
        sparse_linear(x, container)
        assert remembered(container, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sparse_linear(x, container)
    op = "pyfast::bitmap_linear" if kernel == "direct" else "pyfast::indexed_linear"
    assert op in [event.key for event in profile.key_averages()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_hold_the_operator(kernel):
    container, x = weight(), torch.randn(3, K)
    with torch.no_grad():
        sparse_linear(x, container)
        assert remembered(container, x)
        traced = torch.jit.trace(lambda x: sparse_linear(x, container), torch.randn(3, K))
        assert relative_error(traced(x), true(x, container)) < 1e-5


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tensors_that_torch_func_wraps(kernel):
    container = weight()
    with torch.no_grad():
        for x in (torch.randn(5, 3, K), torch.randn(5, 3, K)):
            sparse_linear(x[0], container)
            assert remembered(container, x[0])
            y = torch.func.vmap(lambda x: sparse_linear(x, container))(x)
            assert relative_error(y, true(x, container)) < 1e-5
        rows, biases = x[0], torch.randn(5, N)
        y = torch.func.vmap(lambda b: sparse_linear(rows, container, b) + sparse_linear(rows, container, b))(biases)
        assert relative_error(y, 2 * true(rows, container, biases[:, None])) < 1e-5


@pytest.mark.parametrize("n, k", [(1, K), (N, 1), (1, 1)])
def test_lazy_negatives(kernel, n, k):
    """x that is contiguous, of a real dtype, and to be negated by whoever reads it."""
    container = BitmapWeight.from_dense(torch.randn(n, k), mask=torch.ones(n, k, dtype=torch.bool))
    with torch.no_grad():
        for rows in (1, 3):
            sparse_linear(torch.randn(rows, k), container)
            x = torch.randn(rows, k, dtype=torch.complex64).conj().imag
            assert x.is_neg()
            assert relative_error(sparse_linear(x, container), true(x, container)) < 1e-5
            x, mul = torch.randn(rows, k), torch.randn(rows, n)
            sparse_linear(x, container, mul=mul)
            mul = torch.randn(rows, n, dtype=torch.complex64).conj().imag
            assert relative_error(sparse_linear(x, container, mul=mul), true(x, container) * mul.double()) < 1e-5


def test_the_output_is_where_x_is_whatever_the_default_device(kernel):
    container, x = weight(), torch.randn(3, K)
    with torch.no_grad():
        sparse_linear(x, container)
        with torch.device("meta"):
            y = sparse_linear(x, container)
    assert relative_error(y, true(x, container)) < 1e-5


@pytest.mark.parametrize("which", ["bias", "mul"])
def test_subclasses_are_not_remembered(which):
    class Other(torch.Tensor):
        pass

    container, x, bias, mul = weight(), torch.randn(3, K), torch.randn(N), torch.randn(3, N)
    if which == "bias":
        bias = bias.as_subclass(Other)
    else:
        mul = mul.as_subclass(Other)
    with torch.no_grad():
        y = sparse_linear(x, container, bias, mul=mul)
    assert last(container) is None
    assert relative_error(y.as_subclass(torch.Tensor), true(x, container, bias) * mul.double()) < 1e-5


def test_threads_share_what_was_remembered(kernel):
    container = weight()
    inputs = [torch.randn(3, K) for _ in range(64)]

    def serve(x):
        with torch.no_grad():
            return sparse_linear(x, container)

    serve(inputs[0])
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(serve, inputs))
    for x, y in zip(inputs, outputs, strict=True):
        assert relative_error(y, true(x, container)) < 1e-5


def test_what_is_remembered_is_let_go_with_the_weight(kernel):
    container, x = weight(), torch.randn(3, K)
    with torch.no_grad():
        sparse_linear(x, container)
    assert remembered(container, x)
    values = weakref.ref(container.values)
    del container
    gc.collect()
    assert values() is None


def test_the_native_object_takes_three_addresses(kernel):
    container, x = weight(), torch.randn(3, K)
    with torch.no_grad():
        sparse_linear(x, container)
    served = last(container).served
    for wrong in ((), (0, 0), (0, 0, "y")):
        with pytest.raises(TypeError):
            served.run(*wrong)
    with pytest.raises(TypeError):
        type(served)()


@pytest.mark.parametrize(
    "name",
    [
        "torch.autograd._profiler_enabled",
        "torch._C._get_tracing_state",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "torch.autograd.forward_ad._current_level",
    ],
)
def test_without_what_torch_does_not_promise_nothing_is_remembered(kernel, monkeypatch, name):
    monkeypatch.delattr(name)
    module = importlib.reload(remembered_module)
    try:
        monkeypatch.setattr("pyfast.sparse.linear.first_call", module.first_call)
        container, x = weight(), torch.randn(3, K)
        with torch.no_grad():
            for _ in range(2):
                assert relative_error(sparse_linear(x, container), true(x, container)) < 1e-5
        assert last(container) is None
    finally:
        monkeypatch.undo()
        importlib.reload(remembered_module)
