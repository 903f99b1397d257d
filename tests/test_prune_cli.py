"""pyfast prune: the checkpoint that comes out, runs that are killed and go on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from typer.testing import CliRunner

from pyfast.cli import app
from pyfast.sparse import masks_of, prune
from pyfast.sparse.pruning import journal as journals
from pyfast.sparse.pruning.text import documents, text_batches

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SETTINGS = ("--samples", "6", "--sequence-length", "20")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte, behind one that begins every sequence."""
    vocabulary = {"<s>": 0, **{byte: i + 1 for i, byte in enumerate(BYTES)}}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny("Llama", vocab_size=257, num_hidden_layers=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"chapter {i}: " + "the quick brown fox " * (2 + i))
    (folder / "picture.bin").write_bytes(bytes(range(128, 256)))
    (folder / ".hidden").write_text("not to be read " * 20)
    return folder


def call(*arguments):
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def done(*arguments):
    outcome = call(*arguments)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def refused(*arguments):
    outcome = call(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert isinstance(outcome.exception, SystemExit) and "Traceback" not in outcome.output
    return " ".join(outcome.output.split())


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_the_checkpoint_that_comes_out(checkpoint, text, tokenizer, tmp_path):
    out = tmp_path / "deep" / "out"
    arguments = [checkpoint, out, "--text", text, *SETTINGS]
    printed = done("--sparsity", "0.5", "--pattern", "2:4", "--method", "wanda", *arguments)
    assert "mlp.up_proj" in printed and "50.00%" in printed and f"written: {out}" in printed
    got = transformers.AutoModelForCausalLM.from_pretrained(out)
    twin = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    results = prune(twin, text_batches(tokenizer, text, 6, 20, labels=False), "wanda", pattern="2:4")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got.parameters(), twin.parameters(), strict=True))
    assert len(masks_of(got)) == 21
    assert transformers.AutoTokenizer.from_pretrained(out)("fox") == tokenizer("fox")
    report = json.loads((out / "pyfast_prune.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == [result.name for result in results]
    assert report["request"]["method"] == "wanda" and not (out / "prune-state").exists()


def kill_after(monkeypatch, units):
    """The process dies when so many units are in the journal: nothing after that is written."""
    write, written = journals.Journal._write, 0

    def dying(self, path, content):
        nonlocal written
        if written == units:
            raise KeyboardInterrupt
        written += 1
        write(self, path, content)

    monkeypatch.setattr(journals.Journal, "_write", dying)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "taylor", "magnitude"])
@pytest.mark.parametrize("units", [0, 1, 2, 3])
def test_a_killed_run_goes_on_bit_for_bit(method, units, checkpoint, text, tmp_path, monkeypatch):
    arguments = ["--sparsity", "0.6", "--method", method, checkpoint]
    rest = ["--text", text, *SETTINGS] + (["--scope", "global"] if method in ("magnitude", "taylor") else [])
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done(*arguments, whole, *rest)
    with monkeypatch.context() as patch:
        kill_after(patch, units)
        outcome = call(*arguments, resumed, *rest)
        assert outcome.exit_code == 130 and f"the same command goes on from {resumed}" in outcome.output
    state = resumed / "prune-state"
    assert (state / "journal.json").is_file() == (units > 0)
    if units == 3:  # died when the checkpoint was there and the report was not
        assert (resumed / "model.safetensors").is_file() and not (resumed / "pyfast_prune.json").is_file()
    stamps = {path.name: path.stat().st_mtime_ns for path in state.glob("*.safetensors")}
    done(*arguments, resumed, *rest)
    assert files(resumed) == files(whole) and not state.exists()
    assert len(stamps) == min(units + 1, 3)


def test_finished_units_are_taken_from_the_journal_and_not_pruned_again(checkpoint, text, tmp_path, monkeypatch):
    from pyfast.sparse.pruning import model as pruning

    arguments = ["--sparsity", "0.5", checkpoint, tmp_path / "out", "--text", text, *SETTINGS]
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        call(*arguments)
    pruned = []
    collect = pruning.Collector.take

    def taking(self, name):
        pruned.append(name)
        return collect(self, name)

    monkeypatch.setattr(pruning.Collector, "take", taking)
    done(*arguments)
    assert len(pruned) == 7 and all(name.startswith("model.layers.2.") for name in pruned)
    assert "already there" in done(*arguments) and len(pruned) == 7


def test_another_request_is_refused_and_changes_nothing(checkpoint, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = [checkpoint, out, "--text", text, *SETTINGS]
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        call("--sparsity", "0.5", *arguments)
    before = files(out / "prune-state")
    assert "sparsity 0.5 not 0.6" in refused("--sparsity", "0.6", *arguments)
    message = refused("--sparsity", "0.5", "--method", "sparsegpt", *arguments)
    assert "method wanda not sparsegpt, scope row not None" in message
    assert "layers 21 of them not 9 of them" in refused("--sparsity", "0.5", "--include", "*.mlp.*", *arguments)
    assert "calibration" in refused("--sparsity", "0.5", *arguments[:-4], "--samples", "5", "--sequence-length", "20")
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tiny("Llama", vocab_size=257, num_hidden_layers=3, seed=5).save_pretrained(other)
    assert "request: model" in refused("--sparsity", "0.5", other, *arguments[1:])
    assert files(out / "prune-state") == before
    done("--sparsity", "0.5", *arguments)
    assert "sparsity 0.5 not 0.7" in refused("--sparsity", "0.7", *arguments)  # of a finished run too


def test_a_damaged_state_is_refused(checkpoint, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ["--sparsity", "0.5", checkpoint, out, "--text", text, *SETTINGS]
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        call(*arguments)
    weights = out / "prune-state" / "0000.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "0000.safetensors is damaged" in refused(*arguments)
    weights.write_bytes(whole)
    (out / "prune-state" / "journal.json").write_text("{")
    assert "journal.json is no journal of this program" in refused(*arguments)
    assert not (out / "model.safetensors").exists()


def test_an_encoder_with_layers_outside_of_its_blocks(tokenizer, text, tmp_path):
    folder, out = tmp_path / "bert", tmp_path / "out"
    tiny("Bert", "ForMaskedLM", vocab_size=257).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chosen = ["--method", "sparsegpt", "--pattern", "2:4", "--exclude", "*.query"]
    done(*chosen, folder, out, "--text", text, "--samples", "3")
    masks = masks_of(transformers.AutoModelForMaskedLM.from_pretrained(out))
    assert len(masks) == 11 and "cls.predictions.transform.dense" in masks
    assert "needs the loss of a causal language model, not BertForMaskedLM" in refused(
        "--method", "taylor", "--sparsity", "0.5", folder, tmp_path / "no"
    )


def test_magnitude_needs_no_tokenizer(tmp_path):
    tiny("Llama").save_pretrained(tmp_path / "plain")
    done("--method", "magnitude", "--sparsity", "0.5", "--head", tmp_path / "plain", tmp_path / "out")
    assert len(masks_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == 15
    message = refused("--sparsity", "0.5", tmp_path / "plain", tmp_path / "no")
    assert "the tokenizer of" in message and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "best"], "method: got 'best'"),
        (["--sparsity", "1.5"], "sparsity: got 1.5"),
        ([], "sparsity: got None"),
        (["--sparsity", "0.5", "--pattern", "4:2"], "pattern: got '4:2'"),
        (["--sparsity", "0.5", "--format", "csr"], "format: got 'csr', accepted: dense"),
        (["--sparsity", "0.5", "--include", "nothing.*"], "include: 'nothing.*' matches no linear layer"),
        (["--sparsity", "0.5", "--text", "no-such-place"], "text: no-such-place is no file and no folder"),
        (["--sparsity", "0.5", "--samples", "0"], "samples: got 0"),
        (["--sparsity", "0.5", "--sequence-length", "65"], "sequence-length: got 65, accepted: at most 64"),
    ],
)
def test_wrong_arguments(arguments, message, checkpoint, tmp_path):
    assert message in refused(*arguments, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_places_that_are_refused(checkpoint, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    assert "holds other files" in refused("--sparsity", "0.5", checkpoint, taken)
    assert "is a file" in refused("--sparsity", "0.5", checkpoint, taken / "thesis.txt")
    assert "cannot be loaded" in refused("--sparsity", "0.5", tmp_path / "nothing", tmp_path / "out")


# --- text -------------------------------------------------------------------------------------------------------------


def test_every_file_gives_a_sequence_before_any_gives_two(text, tokenizer):
    batches = text_batches(tokenizer, text, 7, 20, labels=True)
    assert [list(batch["input_ids"].shape) for batch in batches] == [[4, 20], [3, 20]]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert (ids[:, 0] == 0).all() and all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)
    starts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert {start[:10] for start in starts[:4]} == {f"chapter {i}:" for i in range(4)}
    assert not any(start.startswith("chapter") for start in starts[4:])
    with pytest.raises(ValueError, match=r"gives \d+ sequences of 20 tokens, 100 are wanted"):
        text_batches(tokenizer, text, 100, 20, labels=False)


def test_text_of_one_file_and_of_the_standard_library(text, tokenizer, tmp_path):
    (batch,) = text_batches(tokenizer, text / "3.txt", 2, 20, labels=False)
    assert tokenizer.decode(batch["input_ids"][0][1:]).startswith("chapter 3:")
    sources = text_batches(tokenizer, None, 5, 30, labels=False)
    again = text_batches(tokenizer, None, 5, 30, labels=False)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(sources, again, strict=True))
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
        next(documents(text / "picture.bin"))
    with pytest.raises(ValueError, match="is not a fast one"):
        text_batches(object(), text, 1, 4, labels=False)
    with pytest.raises(ValueError, match="is no file and no folder"):
        next(documents(Path(tmp_path / "gone")))
