"""Whole models in the benchmark: published shapes, random weights, variants, and the suites that time
them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_samples import check_rows
from torch import nn
from transformers import AutoModelForCausalLM

from pyfast.bench import bars, baselines, decoding, encoder, models, variants
from pyfast.bench.floors import Floors
from pyfast.bench.options import Options
from pyfast.bench.suites import layers as layers_suite
from pyfast.bench.suites import model as model_suite
from pyfast.bench.timing import Timing
from pyfast.bench.variants import Compression, Variant

FLOORS = Floors(copy_gbps=10.0, read_gbps=10.0, dense_gflops=100.0)
QUICK = Options(quick=True)
TINY = {
    "tiny-qwen": models._qwen2(64, 96, 4, 4, 2),
    "tiny-llama": models._llama3(64, 96, 4, 8, factor=8.0, tied=False),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    """Two tiny shapes beside the published ones, with a small vocabulary."""
    for name, dimensions in TINY.items():
        small = models.Dimensions(**{**vars(dimensions), "vocab": 320})
        monkeypatch.setitem(models.PUBLISHED, name, small)
    return list(TINY)


# --- published dimensions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-3b", 3_085_938_688),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name, parameters):
    assert models.weight_bytes(models.load_config(name), torch.bfloat16) == 2 * parameters


@pytest.mark.parametrize("name", list(models.PUBLISHED))
def test_configuration_of_a_published_shape(name):
    config, wanted = models.load_config(name), models.PUBLISHED[name]
    assert (config.model_type, config.num_hidden_layers) == (wanted.family, wanted.layers)
    assert config.tie_word_embeddings is wanted.tied
    attention = models.skeleton(config, torch.bfloat16).model.layers[0].self_attn
    assert attention.k_proj.weight.shape == (wanted.kv_heads * wanted.head_dim, wanted.hidden)
    assert (attention.q_proj.bias is not None) is (wanted.family == "qwen2")
    rope = config.rope_parameters
    assert rope["rope_theta"] == (1e6 if wanted.family == "qwen2" else 5e5)
    assert rope["rope_type"] == ("default" if wanted.family == "qwen2" else "llama3")


# --- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TINY))
def test_drawn_model_equals_one_built_as_usual_with_its_weights(tiny, name):
    built = models.build(name)
    usual = AutoModelForCausalLM.from_config(models.load_config(name)).eval()
    usual.load_state_dict(built.model.state_dict())
    ids = torch.arange(40).view(1, -1)
    with torch.no_grad():
        got, want = built.model(ids).logits, usual(ids).logits
    assert torch.isfinite(got).all() and got.std() > 0
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for (key, mine), (_, theirs) in zip(built.model.named_buffers(), usual.named_buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=key)
    assert (built.kind, built.path, built.note) == ("causal", None, "weights drawn at random")


def test_drawn_weights_look_drawn(tiny):
    model = models.build("tiny-qwen").model
    weight = model.model.layers[0].mlp.up_proj.weight
    assert 0.018 < weight.std() < 0.022 and abs(weight.mean()) < 0.001
    assert len(torch.unique(weight, dim=0)) == len(weight)
    assert not torch.equal(weight, model.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(weight, models.build("tiny-qwen").model.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight, models.build("tiny-qwen", seed=1).model.model.layers[0].mlp.up_proj.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_drawing_leaves_the_generator_of_the_process_alone(tiny):
    before = torch.get_rng_state()
    models.build("tiny-llama")
    assert torch.equal(before, torch.get_rng_state())


def test_a_cut_model_says_so(tiny):
    built = models.build("tiny-qwen", torch.bfloat16, layers=2)
    assert built.name == "tiny-qwen (2 of 4 layers)" and built.layers_published == 4
    assert len(built.model.model.layers) == 2 and built.model.dtype is torch.bfloat16


@pytest.mark.parametrize("layers", [0, -1, 5])
def test_a_number_of_layers_out_of_range_is_refused(tiny, layers):
    with pytest.raises(ValueError, match=rf"layers: got {layers}, .*accepted are 1 to 4"):
        models.build("tiny-qwen", layers=layers)


def test_an_unknown_model_is_refused_with_what_is_accepted(tmp_path):
    for name in ("qwen-9000", str(tmp_path)):
        with pytest.raises(ValueError, match=r"model: .*qwen2\.5-0\.5b.*path of such a folder"):
            models.build(name)


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(tiny, monkeypatch):
    monkeypatch.setattr(models, "available_bytes", lambda device="cpu": 1000)
    monkeypatch.setattr(models, "draw", lambda *args, **kwargs: pytest.fail("the model was made"))
    with pytest.raises(MemoryError, match=r"tiny-qwen: needs about .* GiB are free"):
        models.build("tiny-qwen")


def test_a_local_checkpoint_is_loaded_whole_or_cut(tiny, tmp_path):
    original = models.build("tiny-llama", seed=3).model
    original.save_pretrained(tmp_path / "checkpoint")
    built = models.build(str(tmp_path / "checkpoint"))
    ids = torch.arange(9).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(built.model(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert (built.name, built.kind, built.path) == ("checkpoint", "causal", tmp_path / "checkpoint")
    assert built.note == "weights of a local checkpoint"
    cut = models.build(str(tmp_path / "checkpoint"), layers=2)
    assert len(cut.model.model.layers) == 2 and cut.name == "checkpoint (2 of 4 layers)"


# --- variants -------------------------------------------------------------------------------------------------------


def test_a_shared_copy_holds_no_tensor_of_its_own(tiny):
    model = models.build("tiny-qwen").model
    twin = variants.shared_copy(model)
    assert twin is not model and twin.config is not model.config
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine is theirs
    twin.model.layers[0].mlp.up_proj = nn.Identity()
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert twin.lm_head.weight is model.model.embed_tokens.weight


def test_bytes_and_operations_are_counted_exactly(tiny):
    tied, untied = models.build("tiny-qwen").model, models.build("tiny-llama").model
    held = sum(p.numel() * 4 for p in untied.parameters()) + untied.model.rotary_emb.inv_freq.nbytes * 2
    assert variants.weight_bytes(untied) == held
    assert variants.streamed_bytes(untied) == held - 4 * 320 * 64
    assert variants.streamed_bytes(tied) == variants.weight_bytes(tied), "a tied head is read, the embedding is it"
    block = sum(m.weight.numel() for m in tied.model.layers[0].modules() if isinstance(m, nn.Linear))
    assert variants.flops(tied, 7) == 2 * (7 * 4 * block + 320 * 64)


def test_packed_models_compute_the_same(tiny):
    model = models.build("tiny-qwen").model
    kinds = [kind for kind in baselines.available("cpu", (torch.float32,)) if kind.impl != "F.linear"]
    ids = torch.arange(12).view(1, -1)
    for kind in kinds:
        twin = variants.packed(model, kind, (1, 12))
        assert not any(type(m) is nn.Linear for m in twin.modules())
        assert variants.streamed_bytes(twin) == variants.streamed_bytes(model)
        assert variants.flops(twin, 12) == variants.flops(model, 12)
        for count in (1, 5, 12):
            with torch.no_grad():
                got, want = twin(ids[:, :count]).logits, model(ids[:, :count]).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_head_can_be_that_of_another_model(tiny):
    model = models.build("tiny-qwen").model
    kind = next(kind for kind in baselines.available("cpu", (torch.float32,)) if kind.impl != "F.linear")
    donor, twin = variants.packed(model, kind, (1,)), variants.shared_copy(model)
    variants.adopt_head(twin, donor)
    assert twin.lm_head is donor.lm_head and isinstance(model.lm_head, nn.Linear)
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_hopeless_dense_variants_are_timed_once(tiny):
    model = models.build("tiny-qwen").model
    dense = [
        Variant(Compression("dense"), model, dtype, impl)
        for dtype, impl in (("float32", "F.linear"), ("float32", "packed"), ("bfloat16", "F.linear"))
    ]
    first = {
        "decode": {v.name: Timing(ms, ms, ms, 1) for v, ms in zip(dense, (3.0, 2.5, 9.0), strict=True)},
        "prefill": {v.name: Timing(ms, ms, ms, 1) for v, ms in zip(dense, (3.0, 1.0, 9.0), strict=True)},
    }
    kept, beaten = model_suite._contenders(dense, first)
    assert [(v.name, v.ops) for v in beaten] == [(dense[0].name, ("prefill",))]
    assert [v.ops for v in kept] == [("decode",), ("decode", "prefill"), ("decode", "prefill")]


def test_decoding_step_by_step_is_greedy_generation(tiny):
    model = models.build("tiny-llama").model
    prompt = decoding.random_prompt(model, 6, seed=0, device="cpu")
    decoder = decoding.Decoder(model, prompt)
    got = [int(decoder.token)] + [int(decoder.step()) for _ in range(4)]
    want = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 6:]
    assert got == want.tolist()


class Uncaptured:
    """Stands for a CUDA graph: runs once at its making, and at each call."""

    def __init__(self, calls):
        self.calls = calls
        self()

    def __call__(self):
        return [call() for call in self.calls][-1]


def test_decoding_over_a_cache_of_fixed_size_is_greedy_generation(tiny, monkeypatch):
    monkeypatch.setattr(decoding, "Captured", Uncaptured)
    monkeypatch.setattr(decoding, "_CACHE_TOKENS", 12)
    model = models.build("tiny-llama").model
    prompt = decoding.random_prompt(model, 6, seed=0, device="cpu")
    decoder = decoding.CapturedDecoder(model, prompt)
    got = [int(decoder.token)] + [int(decoder.step()) for _ in range(4)]
    want = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 6:].tolist()
    assert got == want[1:]
    for _ in range(6):  # the cache of 12 places begins again after the prompt
        assert decoder.step().shape == (1, 1)
    logits = decoding.captured_prefiller(model, prompt)()
    torch.testing.assert_close(logits, decoding.prefiller(model, prompt)())


def test_a_compiled_token_is_the_same(tiny, monkeypatch):
    monkeypatch.setattr(decoding, "Captured", Uncaptured)
    model = variants.compress(models.build("tiny-llama").model, Compression("bitmap", 0.5), (1, 6), traceable=True)
    prompt = decoding.random_prompt(model, decoding.PROMPT_TOKENS, seed=0, device="cpu")
    torch._dynamo.reset()
    step = decoding.call(model, "decode", device="cpu", seed=0, compiled=True)
    got = [int(step()) for _ in range(3)]
    assert sum(torch._dynamo.utils.counters["stats"].values()) > 0
    want = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, decoding.PROMPT_TOKENS :]
    assert got == want[2:].tolist()


def test_what_does_not_compile_is_left_out(tiny, quiet, monkeypatch):
    plain = Variant(Compression("dense"), models.build("tiny-llama").model, "float32", "F.linear")
    twin = replace(plain, impl="torch.compile", ops=("decode",), compiled=True)
    asked = []
    monkeypatch.setattr(decoding, "call", lambda model, op, **how: asked.append((op, how["compiled"])))
    dense = model_suite._Dense({"float32": plain}, [plain, twin], "n", "")
    made = model_suite._compiled(dense, Options(), quiet)
    assert [v.what for v in made] == list(model_suite.COMPILED) and asked == [("decode", True)] * 2
    assert all(v.compiled and v.ops == ("decode",) and v.impl == "pyfast, torch.compile" for v in made)
    timings = {v.name: Timing(ms, ms, ms, 1) for v, ms in ((plain, 2.0), (twin, 1.0))}
    assert model_suite._best_of_dtype(dense.variants, timings, "float32") is plain
    dense.variants = [plain]
    assert model_suite._compiled(dense, Options(), quiet) == []

    def fails(*args, **kwargs):
        raise NotImplementedError("no backend")

    monkeypatch.setattr(decoding, "call", fails)
    with pytest.warns(RuntimeWarning, match=r"dense · torch\.compile · float32 is left out: no backend"):
        assert model_suite._if_it_compiles(twin, Options(), quiet) == []


def test_the_best_dense_is_the_fastest_uncompressed_one(tiny):
    model = models.build("tiny-qwen").model
    made = [
        Variant(Compression("dense"), model, "float32", "F.linear"),
        Variant(Compression("dense"), model, "bfloat16", "F.linear"),
        Variant(Compression("2:4", 0.5), model, "float32", "pyfast"),
    ]
    timings = {v.name: Timing(ms, ms, ms, 1) for v, ms in zip(made, (3.0, 2.0, 1.0), strict=True)}
    assert variants.best_dense(made, timings) is made[1]
    assert variants.same_dtype_speedup(made[2], made, timings) == {"speedup_same_dtype": 3.0}
    assert variants.best_dense(made[2:], timings) is None


# --- suite model ----------------------------------------------------------------------------------------------------


def test_suite_model_measures_every_compression(tiny, quiet):
    rows = model_suite.measure(model_suite.Case("tiny-qwen"), Options(), FLOORS, quiet)
    check_rows(rows)
    for op in ("decode", "prefill"):
        mine = [r for r in rows if r.op == op]
        found = {(r.format, r.sparsity) for r in mine}
        assert found == {
            ("dense", 0.0),
            ("2:4", 0.5),
            ("bitmap", 0.5),
            ("bitmap", 0.8),
            ("bitmap", 0.9),
            ("layers", 0.25),
        }
        assert {r.dtype for r in mine if r.format == "dense"} == {"float32", "bfloat16"}
        rate = "tokens_per_s" if op == "decode" else "prefill_tokens_per_s"
        assert all(r.metrics[rate] == pytest.approx(1000 * r.tokens / r.ms) for r in mine)
        assert all(r.metrics["peak_bytes"] >= r.metrics["weight_bytes"] > 0 for r in mine)
        assert all("weights drawn at random" in r.note and r.case == "tiny-qwen" for r in mine)
    decode = [r for r in rows if r.op == "decode"]
    (whole,) = [r for r in decode if r.impl == bars.HEAD_TOO and r.dtype == "float32"]
    decode = [r for r in decode if r.impl != bars.HEAD_TOO]
    sizes = {(r.format, r.sparsity, r.dtype): r.bytes for r in decode}
    assert sizes["bitmap", 0.9, "float32"] < sizes["bitmap", 0.8, "float32"] < sizes["bitmap", 0.5, "float32"]
    assert sizes["bitmap", 0.5, "float32"] < sizes["dense", 0.0, "float32"]
    work = {(r.format, r.sparsity): r.flops for r in decode if r.dtype == "float32"}
    head = 2 * 320 * 64
    assert work["2:4", 0.5] - head == pytest.approx((work["dense", 0.0] - head) / 2)
    assert work["bitmap", 0.8] - head == pytest.approx((work["dense", 0.0] - head) / 5, rel=0.01)
    assert whole.flops == pytest.approx(work["dense", 0.0] / 5, rel=0.01)
    assert whole.bytes < sizes["bitmap", 0.8, "float32"] and "untied" in whole.note
    for r in [*decode, whole]:
        if r.format != "dense":
            dense = next(d for d in decode if f"{d.impl} {d.dtype}" == r.baseline and d.format == "dense")
            assert r.metrics["predicted_speedup"] == pytest.approx(dense.bytes / r.bytes)


def test_predicted_removal_counts_the_head(tiny):
    model = models.build("tiny-qwen").model
    cut = variants.without_layers(model, [2], verify=False)
    p = variants.weight_bytes(model.model.layers[0])
    e = variants.streamed_bytes(model) - 4 * p
    assert variants.streamed_bytes(model) / variants.streamed_bytes(cut) == pytest.approx((4 * p + e) / (3 * p + e))
    assert len(model.model.layers) == 4


def test_suite_model_makes_variants_in_place_where_memory_is_short(tiny, quiet, monkeypatch):
    case = model_suite.Case("tiny-llama")
    monkeypatch.setattr(
        model_suite, "_plan", lambda recipes, dense, device: ([[]], [r for r in recipes if r[0] == "float32"][:2])
    )
    monkeypatch.setattr(model_suite, "_dtypes", lambda *args: ["float32"])
    rows = model_suite.measure(case, QUICK, FLOORS, quiet)
    check_rows(rows)
    alone = [r for r in rows if r.format in ("2:4", "bitmap")]
    assert len(alone) == 4 and all("timed apart" in r.note for r in alone)
    assert all(r.baseline and r.speedup for r in alone)


def test_plan_groups_by_memory(tiny, monkeypatch):
    model = models.build("tiny-qwen").model
    dense = model_suite._Dense({"float32": Variant(Compression("dense"), model, "float32", "F.linear")}, [], "n", "")
    recipes = [("float32", what) for what in variants.COMPRESSIONS]
    whole = variants.weight_bytes(model)
    monkeypatch.setattr(models, "available_bytes", lambda device="cpu": 100 * whole)
    assert model_suite._plan(recipes, dense, "cpu") == ([recipes], [])
    monkeypatch.setattr(models, "available_bytes", lambda device="cpu": int(2.0 * whole))
    assert model_suite._plan(recipes, dense, "cpu") == ([recipes[:1], recipes[1:2], recipes[2:]], [])
    monkeypatch.setattr(models, "available_bytes", lambda device="cpu": int(1.5 * whole))
    assert model_suite._plan(recipes, dense, "cpu") == ([recipes[2:]], recipes[:2])


def test_suite_model_leaves_out_what_does_not_fit(tiny, quiet, monkeypatch):
    monkeypatch.setattr(models, "available_bytes", lambda device="cpu": 1000)
    monkeypatch.setattr(encoder, "run", lambda *args, **kwargs: [])
    with pytest.warns(RuntimeWarning, match=r"model qwen2\.5-0\.5b, 4 layers is left out: .* GiB are free"):
        results, judged = model_suite.run(QUICK, FLOORS, quiet)
    assert results == [] and len(judged) == 4 and all(bar.met is None for bar in judged)


def test_cases_of_the_suite():
    assert [c.id for c in model_suite.cases(Options())] == ["qwen2.5-0.5b"]
    assert [c.layers for c in model_suite.cases(QUICK)] == [model_suite.QUICK_LAYERS]
    assert [c.model for c in model_suite.cases(Options(model_path="/some/folder"))] == ["/some/folder"]


def test_operation_cases_build_what_they_name(tiny):
    for op in ("decode", "prefill"):
        case = model_suite.OperationCase(model_suite.Case("tiny-llama", 2), op)
        calls = case.implementations()
        assert list(calls) == case.names
        assert all(call() is not None for call in calls.values())
    ids = [case.id for case in model_suite.operation_cases(QUICK)]
    assert len(set(ids)) == len(ids) == 2 and not any(" " in name for name in ids)


# --- suite layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_suite_layers_measures_every_depth(tiny, op):
    case = layers_suite.Case("tiny-llama", op, layers=4, removed=(0, 1, 2))
    rows = layers_suite.measure(case, QUICK, FLOORS)
    check_rows(rows)
    assert [r.metrics["layers"] for r in rows] == [4, 3, 2]
    assert [r.sparsity for r in rows] == [0.0, 0.25, 0.5] and [r.format for r in rows] == ["dense", "layers", "layers"]
    assert all(r.baseline == "F.linear float32" and r.baseline_ms == rows[0].ms for r in rows)
    work = [r.bytes if op == "decode" else r.flops for r in rows]
    for r, own in zip(rows, work, strict=True):
        assert r.metrics["predicted_speedup"] == pytest.approx(work[0] / own)
        assert r.metrics["measured_over_predicted"] == pytest.approx(r.speedup / r.metrics["predicted_speedup"])


def test_layer_stacks_share_their_weights(tiny):
    stacks = layers_suite.Case("tiny-qwen", "decode", layers=3, removed=(0, 1)).stacks()
    whole, cut = (variant.model for variant in stacks.values())
    assert list(stacks) == ["3 of 3 layers", "2 of 3 layers"]
    assert cut.model.layers[1] is not whole.model.layers[2]
    assert cut.model.layers[1].mlp.up_proj.weight is whole.model.layers[2].mlp.up_proj.weight, "the final layer stays"
    assert cut.lm_head.weight is whole.lm_head.weight
