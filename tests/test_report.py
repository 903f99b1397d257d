"""The report page: it renders whatever a run gives, escapes all of it, and loads nothing."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from pyfast.bench import headline, plots, report
from pyfast.bench.schema import Bar, Report, Result

VOID = {"meta", "link", "br", "input", "img", "hr"}


def result(**fields) -> Result:
    """A result with everything that does not matter filled in."""
    ms = fields.pop("ms", 2.0)
    base = dict(suite="sparse", op="sparse_linear", case="4096x4096", shape=[4096, 4096], tokens=1, format="bitmap")
    base |= dict(sparsity=0.5, dtype="float32", impl="pyfast", ms=ms, ms_min=0.95 * ms, ms_max=1.08 * ms)
    base |= dict(bytes=10**7, flops=10**7)
    base |= fields
    if base.get("baseline_ms") and "speedup" not in fields:
        base["speedup"] = base["baseline_ms"] / ms
    return Result(**base)


def sparse_rows() -> list[Result]:
    """Three numbers of tokens, two dtypes: bitmap pays early at one token, late at 128."""
    rows = []
    for shape in ([4096, 4096], [4864, 896]):
        for tokens, dense_ms, gains in ((1, 3.0, (1.8, 2.6, 3.7, 5.5)), (128, 24.0, (0.7, 1.0, 1.9, 3.4))):
            common = dict(shape=shape, case="x".join(map(str, shape)), tokens=tokens, baseline="F.linear float32")
            common |= dict(baseline_ms=dense_ms, of_floor=0.62, floor_ms=1.0, error=1e-7)
            dense = dict(format="dense", sparsity=0.0, impl="F.linear")
            rows.append(result(ms=dense_ms, metrics={"weight_bytes": 67.1e6}, **dense, **common))
            rows += [
                result(ms=dense_ms / gain * slower, sparsity=s, dtype=dtype, **common)
                for dtype, slower in (("float32", 1.0), ("bfloat16", 0.7))
                for s, gain in zip((0.5, 0.7, 0.8, 0.9), gains, strict=True)
            ]
            rows.append(result(ms=dense_ms / 1.7, format="2:4", **common))
    return rows


def loss_rows() -> list[Result]:
    """A fused loss beside eager and compiled torch."""
    rows = []
    for shape in ([512, 32000], [128, 151936]):
        common = dict(suite="losses", op="distill_kl", case="loss+gradient", shape=shape, tokens=shape[0])
        common |= dict(format="none", sparsity=0.0, baseline="eager", baseline_ms=180.0, floor_ms=9.0)
        rows.append(result(ms=13.0, of_floor=0.69, metrics={"speedup_vs_compile": 6.4}, **common))
        rows.append(result(ms=180.0, of_floor=0.05, **(common | {"impl": "eager"})))
        rows.append(result(ms=84.0, of_floor=0.11, **(common | {"impl": "torch.compile"})))
    return rows


def model_rows() -> list[Result]:
    """Decoding and prefill of one model, and the embeddings of an encoder."""
    rows = []
    kinds = (("dense", 0.0, "F.linear", 1.0, None), ("2:4", 0.5, "pyfast", 1.5, 1.6))
    kinds += (("bitmap", 0.8, "pyfast", 2.3, 2.6), ("layers", 5 / 24, "F.linear", 1.17, 1.18))
    for op, tokens, base_ms, loss in (("decode", 1, 95.0, 1.0), ("prefill", 128, 700.0, 0.6)):
        for format, sparsity, impl, gain, predicted in kinds:
            gain = gain if format in ("dense", "layers") else gain * loss
            metrics = {"weight_bytes": 1.9e9 / (predicted or 1.0), "peak_bytes": 2.0e9}
            if predicted and op == "decode":
                metrics["predicted_speedup"] = predicted
            rows.append(
                result(
                    suite="model",
                    op=op,
                    case="qwen2.5-0.5b",
                    shape=[1, tokens],
                    tokens=tokens,
                    format=format,
                    sparsity=sparsity,
                    impl=impl,
                    ms=base_ms / gain,
                    baseline="F.linear float32",
                    baseline_ms=base_ms,
                    metrics=metrics,
                    of_floor=0.7,
                    note="weights drawn at random",
                )
            )
    embeddings = [("dense", 0.0, "F.linear", 1.0, 1.0), ("bitmap", 0.5, "pyfast", 1.2, 0.73)]
    embeddings += [("bitmap", 0.9, "pyfast", 2.1, 0.2), ("2:4", 0.5, "pyfast", 1.25, 0.71)]
    embeddings += [("layers", 1 / 6, "F.linear[block influence]", 1.19, 0.94)]
    embeddings += [("layers", 1 / 6, "F.linear[last layers]", 1.2, 0.48)]
    for count in (1, 16):
        for format, sparsity, impl, gain, cosine in embeddings:
            rows.append(
                result(
                    suite="model",
                    op="embed",
                    case="minilm-l6",
                    shape=[count, 16],
                    tokens=16 * count,
                    format=format,
                    sparsity=sparsity,
                    impl=impl,
                    ms=8.0 * count / gain,
                    baseline="F.linear float32",
                    baseline_ms=8.0 * count,
                    metrics={"cosine": cosine, "neighbour_overlap": cosine**2},
                )
            )
    return rows


def layer_rows() -> list[Result]:
    """A stack of nine layers cut to six."""
    return [
        result(
            suite="layers",
            op=op,
            case="qwen2.5-0.5b width, 9 layers",
            shape=[1, tokens],
            tokens=tokens,
            format="layers" if gone else "dense",
            sparsity=gone / 9,
            impl="F.linear",
            ms=40.0 / (1 + 0.06 * gone),
            baseline="F.linear float32",
            baseline_ms=40.0,
            metrics={"predicted_speedup": 1 + 0.065 * gone},
        )
        for op, tokens in (("decode", 1), ("prefill", 128))
        for gone in range(4)
    ]


def full_report() -> Report:
    """A report with every suite, and bars of all three outcomes."""
    environment = {"device": "Example CPU", "isa": "avx512", "threads": 2, "torch": "2.13.0", "copy_gbps": 20.1}
    environment |= {"last_level_cache_bytes": 32 << 20, "commit": None, "date": "2026-01-31"}
    bars = [Bar.judge("2:4, one token", 1.6, 1.7), Bar.judge("bitmap at 80 %, one token", 3.5, 3.1, note="close")]
    bars.append(Bar.judge("share of the copy floor", 0.45, None, unit="of floor"))
    return Report(environment, [*loss_rows(), *sparse_rows(), *layer_rows(), *model_rows()], bars)


class _Checker(HTMLParser):
    """Counts what is needed of a page, and insists that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("src", "href", "xlink:href", "data") if key in found]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return report.render(full_report())


def test_write_makes_one_page_and_nothing_else(tmp_path):
    target = report.write(full_report(), tmp_path / "new" / "folder")
    assert target == tmp_path / "new" / "folder" / "index.html"
    assert [path.name for path in target.parent.iterdir()] == ["index.html"]
    assert target.read_text(encoding="utf-8") == report.render(full_report())


def test_page_is_well_formed_and_loads_nothing(page):
    checked = _Checker(page)
    assert len(checked.ids) == len(set(checked.ids)), "an id stands twice"
    assert all(link.startswith(("#", "data:")) for link in checked.links)
    assert not re.search(r"@import|url\((?!#)", page)
    for target in re.findall(r'href="#([^"]+)"', page):
        assert target in checked.ids


def test_every_suite_has_its_table_and_plots(page):
    for suite in ("losses", "sparse", "layers", "model"):
        assert f'id="{suite}-table"' in page
    assert page.count("<svg ") == page.count("<figure>") == page.count("</figure>") >= 9
    assert "Not in this report" not in page
    assert len(re.findall(r"<tr[ >]", page)) >= len(full_report().results)


def test_svgs_are_valid_named_and_follow_the_theme(page):
    pictures = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert pictures
    for picture in pictures:
        root = ET.fromstring(picture)
        assert root.attrib["role"] == "img" and len(root.attrib["aria-label"]) > 40
        assert "var(--" in picture
        assert not any(placeholder in picture for placeholder in plots._VARIABLES)
        assert "<text" in picture, "text must stay text"


def test_losing_cases_are_shown(page):
    losing = headline.lost(full_report().results)
    assert losing
    assert page.count("(slower)") >= len(losing) - page.count("(noise)")
    assert "Where compression loses here" in page
    lost = next(f for f in headline.findings(full_report()) if f.question == "Cases in which it loses")
    assert lost.figure.startswith(f"{len(losing)} of ") and lost.good is False


def test_headline_comes_from_the_results():
    found = {f.question: f for f in headline.findings(full_report())}
    assert found["Fused distillation loss"].figure == "13.8\N{MULTIPLICATION SIGN}"
    assert found["Whole model, decoding: qwen2.5-0.5b"].figure == f"{1000 / (95 / 2.3):.3g} tokens/s"
    assert found["Removing 21 % of the layers"].figure == "1.17\N{MULTIPLICATION SIGN}"
    assert found["Real weights, no healing: minilm-l6"].figure.startswith("cosine 0.94 at 1.19")
    assert "the last ones keeps 0.48" in found["Real weights, no healing: minilm-l6"].sentence
    assert found["From which sparsity it pays, 128 tokens"].figure == "70 %"


def test_bars_tell_all_three_outcomes(page):
    for word in (">met<", ">not met<", ">undecided<"):
        assert word in page


def test_noise_is_called_noise():
    rows = [result(ms=3.0, format="dense", sparsity=0.0, impl="F.linear", baseline="F.linear float32", baseline_ms=3.0)]
    rows.append(result(ms=3.01, baseline="F.linear float32", baseline_ms=3.0))
    assert "1.00\N{MULTIPLICATION SIGN} (noise)" in report.render(Report({}, rows))


@pytest.mark.parametrize("kept", ["losses", "sparse", "layers", "model"])
def test_missing_suites_are_named(kept):
    whole = full_report()
    page = report.render(Report(whole.environment, whole.select(suite=kept)))
    _Checker(page)
    missing = [suite for suite in ("losses", "sparse", "layers", "model") if suite != kept]
    assert f"pyfast bench {' '.join(missing)}" in page


def test_empty_report_renders():
    page = report.render(Report())
    checked = _Checker(page)
    assert "holds no results yet" in page and "<svg" not in page
    assert "pyfast bench losses sparse layers model" in "".join(checked.text)


def test_values_that_are_missing_or_not_finite_render():
    rows = full_report().results
    for place, row in enumerate(rows):
        row.speedup = (None, math.nan, math.inf, row.speedup)[place % 4]
        row.of_floor = (math.nan, None, row.of_floor)[place % 3]
        row.error = (math.inf, None)[place % 2]
        row.ms = math.nan if place % 5 == 0 else row.ms
        row.baseline_ms = None if place % 7 == 0 else row.baseline_ms
        row.metrics = {name: math.nan if place % 3 == 0 else value for name, value in row.metrics.items()}
    bars = [Bar("a", 1.0, math.nan, None), Bar("b", 1.0, None, None)]
    page = report.render(Report({"copy_gbps": math.nan, "isa": None}, rows, bars))
    _Checker(page)
    assert not re.search(r">\s*(nan|inf)\b", page)
    assert "application/json" not in page, "what JSON cannot hold is not offered as JSON"


def test_unknown_suites_and_single_points_render():
    rows = [result(), result(suite="later", op="x", format="none", metrics={"figure": 1.5}, tokens=0)]
    page = report.render(Report({"device": "d"}, rows))
    assert 'id="later-table"' in page
    _Checker(page)


def test_everything_is_escaped():
    evil = '<script>alert("x")</script>&\'"{0}'
    row = result(case=evil, impl=evil, note=evil, dtype=evil, baseline=evil, baseline_ms=1.0, op=evil)
    row.metrics = {evil: 1.0}
    model = [r for r in model_rows() if r.op != "embed"]
    for r in model:
        r.case, r.impl, r.note = evil, evil, evil
    whole = Report({"device": evil, evil: evil}, [row, *model], [Bar(evil, 1.0, 2.0, True, evil, evil)])
    page = report.render(whole)
    checked = _Checker(page)
    assert page.count("<script>") == 1 and "alert(" not in page.split("<script>")[1]
    assert evil in "".join(checked.text)


def test_the_embedded_json_is_the_report(page):
    import base64

    data = re.search(r'data:application/json;base64,([^"]+)"', page)
    assert data is not None
    text = base64.b64decode(data[1]).decode()
    assert json.loads(text) == json.loads(full_report().to_json())


def test_pages_are_reproducible(page):
    assert page == report.render(full_report())
