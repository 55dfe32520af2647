"""`kvfx report`: which files it takes, and what its page says."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from kvfx.bench.throughput import Largest, LoadRow, ThroughputBench
from kvfx.cli import app
from kvfx.errors import InputError
from kvfx.eval.results import Results
from kvfx.eval.table import sections
from kvfx.figures.collect import pictures
from kvfx.figures.inputs import read_inputs, steps
from kvfx.figures.page import page_html

pytest.importorskip("matplotlib", reason="pip install matplotlib")

PLAN = {
    "kvfx_plan": 1,
    "policy": "LayerBudgets(budget=0.5, shares=(3.0, 1.0)) | SnapKV(budget=0.5)",
    "sites": [
        {"name": f"layers.{at}", "policy": "SnapKV(budget=0.5) | Full()", "note": ""}
        for at in range(2)
    ],
}


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN))
    return path


@pytest.fixture
def html(results_file, bench_file, plan_file):
    inputs = read_inputs([results_file, bench_file, plan_file])
    return page_html(inputs, pictures(inputs))


def test_inputs_are_known_by_their_content(
    results_file, bench_file, plan_file, measurements, bench
):
    inputs = read_inputs([plan_file, results_file, bench_file, results_file])
    assert list(inputs.measurements) == measurements
    assert inputs.repeated == len(measurements)
    assert inputs.benches == (bench,)
    assert inputs.plans == {"plan.json": PLAN}
    assert inputs.refused == {"KIVI(bits=2)": "head_dim <is> odd"}
    names = [picture.name for picture in pictures(inputs)]
    assert names == ["quality_bytes", "needles", "speed", "layer_budgets"]


def test_two_models_are_two_pictures(results_file, measurements, tmp_path):
    other = Results(tmp_path / "other.json")
    for found in measurements:
        other.add(replace(found, setting=replace(found.setting, model="large")))
    names = [one.name for one in pictures(read_inputs([results_file, other.path]))]
    assert names == ["quality_bytes_1", "quality_bytes_2", "needles_1", "needles_2"]


def test_a_benchmark_of_random_weights_is_one(rows, tmp_path):
    largest = Largest(8, 2.0, 4000.0, None)
    made = tuple(LoadRow(row, 0.1, None, largest, None) for row in rows)
    bench = ThroughputBench(
        "llama-3.1-8b", "a CPU", 1, "2026-11-21", {}, "random", 8, False, 3, 32, made
    )
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench.to_dict()))
    inputs = read_inputs([path])
    assert inputs.benches == (bench,)
    assert steps(inputs.benches[0]) == list(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "cannot be read as JSON"),
        ("[1, 2]", "is a JSON list of 2 items: expected the results of kvfx eval --out"),
        ('"text"', "is a JSON str"),
        ('{"device": "x", "rows": []}', "is a JSON object with 'device', 'rows': expected"),
        ("{}", "is a JSON object with no keys"),
        ('{"kvfx_plan": 7, "policy": "", "sites": []}', "has format 7, this version reads 1"),
        ('{"kvfx_plan": 1, "policy": "Full()", "sites": []}', "no policy or no sites"),
        ('{"rows": [{"x": 1}], "new_tokens": 3}', "is not of this version"),
        ('{"format": 9, "measurements": []}', "has format 9"),
        ('{"format": 1, "measurements": [], "refused": {}}', "no measurement is in there"),
    ],
)
def test_foreign_files_are_refused(text, message, tmp_path):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_inputs([path])
    assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_inputs([tmp_path / "nothing.json"])


def test_the_page_says_what_the_tables_say(html, measurements):
    words = Page(html).words
    for part in sections(measurements):
        for cell in (part.title, part.remark, *part.header, *(c for row in part.rows for c in row)):
            assert cell in words
    for word in ("tiny in float32", "a CPU, 1 threads", "kvfx 0.1.0, torch 2.13.0", "2026-11-21"):
        assert word in words
    assert "from 2,000 (interpolated: 1,750)" in words
    assert "question hidden, template_sha256 0123" in words
    assert "head_dim <is> odd" in words
    assert PLAN["policy"] in words
    assert any("kvfx wrong at 1,000: wrong: logits are not finite" in word for word in words)


def test_the_page_needs_no_other_file(html):
    page = Page(html)
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    outer = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.search(r"https?://|@import|url\((?!#)|<script", outer)
    assert html.count("<svg ") == 4
    assert "{{" not in html


def test_ids_are_unique_and_labels_exist(html):
    tags = Page(html).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["aria-labelledby"] for _, attrs in tags if "aria-labelledby" in attrs} <= set(ids)


def test_equal_inputs_give_equal_pages(html, results_file, bench_file, plan_file):
    inputs = read_inputs([results_file, bench_file, plan_file])
    assert page_html(inputs, pictures(inputs)) == html


def test_text_of_others_is_escaped(measurements, tmp_path):
    odd = "<script>alert('{{ links }}')</script>"
    results = Results(tmp_path / "odd.json", refused={odd: odd})
    for found in measurements:
        setting = replace(found.setting, model=odd, text=odd)
        results.add(replace(found, setting=setting, label=f"{found.label}{odd}"))
    inputs = read_inputs([results.path])
    html = page_html(inputs, pictures(inputs))
    assert "<script" not in html
    # the template fills its own places only
    assert html.count("{{ links }}") > 5
    assert Page(html).words.count(odd) >= 2


def test_the_command_writes_the_page_and_the_figures(results_file, bench_file, tmp_path):
    page, folder = tmp_path / "out.html", tmp_path / "a" / "figures"
    arguments = ["report", str(results_file), str(bench_file), "--html", str(page)]
    done = CliRunner().invoke(app, [*arguments, "--figures", str(folder)])
    assert done.exit_code == 0, done.output
    assert "3 pictures" in done.output
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}{suffix}"
        for name in ("quality_bytes", "needles", "speed")
        for suffix in (".svg", ".png", ".json")
    )
    data = json.loads((folder / "speed.json").read_text())
    assert data["contenders"][1]["smaller"]["interpolated"] == 1500.0


def test_the_command_refuses_in_one_line(tmp_path, bench):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps([asdict(bench)]))
    done = CliRunner().invoke(app, ["report", str(path), "--html", str(tmp_path / "out.html")])
    assert done.exit_code == 1
    assert "is a JSON list of 1 items" in done.output
    assert not (tmp_path / "out.html").exists()
