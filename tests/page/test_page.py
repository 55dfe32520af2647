"""The page as a file: complete, self-contained, escaped, small where layers are equal."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

import kvfx
from kvfx import cli
from kvfx.errors import UnmatchedAttention, UnsupportedShape
from kvfx.ops import name_of
from kvfx.page.data import DOES, Subject, page_data
from kvfx.page.write import page_html
from kvfx.pass_manager import Trail
from kvfx.testing.tiny import tiny, tiny_gemma3, tiny_llama

ODD = "<script>alert(1)</script>"


def data_in(html: str) -> dict:
    """The data of a page, as its program reads it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(found.group(1))


class Tags(HTMLParser):
    """The tags of a page in order, with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def html(page):
    return page.read_text("utf-8")


@pytest.fixture(scope="module")
def data(html):
    return data_in(html)


def test_a_page_needs_no_other_file(html):
    tags = Tags(html).found
    links = [attrs.get(name) for _, attrs in tags for name in ("src", "href") if name in attrs]
    assert all(link.startswith(("#", "data:")) for link in links)
    outer = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.DOTALL)
    assert not re.search(r"https?://|@import|url\(|fetch\(", outer)


def test_ids_are_unique_and_labels_exist(html):
    tags = Tags(html).found
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = {attrs["aria-labelledby"] for _, attrs in tags if "aria-labelledby" in attrs}
    assert labels <= set(ids)


def test_the_overview_says_what_the_report_says(fast, data):
    report = data["report"]
    assert data["model"] == "LlamaForCausalLM"
    assert data["policy"] == "SnapKV(budget=0.5) | KIVI(bits=4)"
    assert report["before"] == fast.report.before
    assert [site["after"] for site in report["sites"]] == [s.after for s in fast.report.sites]
    assert [(row["names"], row["count"]) for row in report["rows"]] == [
        ("model.layers.0-1.self_attn", 2)
    ]
    assert [program["name"] for program in data["programs"]] == list(fast.graphs)
    assert data["versions"]["kvfx"] == kvfx.__version__
    assert {"torch", "transformers"} <= set(data["versions"])


def test_programs_are_told_apart():
    assert set(DOES) == {"prefill", "extend", "decode", "compact"}


def test_every_drawing_is_well_formed(data):
    assert {key.split("/")[0] for key in data["drawings"]} == {
        "before", "prefill", "extend", "decode", "compact",
    }  # fmt: skip
    for drawing in data["drawings"].values():
        ElementTree.fromstring(drawing)


def test_every_kvfx_node_has_its_detail(fast, data):
    """What is drawn of a kind stands for all of its layers: the details are those of the first."""
    shown = [detail["line"] for detail in data["details"].values() if "op" in detail]
    for graph in (fast.raised, *fast.graphs.values()):
        lines = [
            line
            for node, line in zip(
                (node for node in graph.nodes if node.op != "get_attr"),
                graph.text.splitlines(),
                strict=True,
            )
            if name_of(node.target) is not None and "layers.1" not in line
        ]
        assert lines
        assert set(lines) <= set(shown)


def test_a_detail_says_all_about_its_node(data):
    detail = next(
        detail for detail in data["details"].values() if detail.get("op") == "attend_scored_kivi"
    )
    assert detail["site"] == "model.layers.0.self_attn"
    assert detail["rule"] == "SnapKV | KIVI"
    assert detail["pass"] == "insert-cache"
    assert detail["backend"] == "reference"
    operands = {operand["name"]: operand for operand in detail["operands"]}
    assert operands["k_codes"]["type"] == "i16[B,2,C,8,32]"
    assert operands["k_codes"]["bytes"] > operands["length"]["bytes"] == 8
    assert operands["score"]["written"]
    assert not operands["k_codes"]["written"]
    assert operands["k_bits"] == {"name": "k_bits", "value": "4"}
    op = data["ops"]["attend_scored_kivi"]
    assert op["schema"].startswith("kvfx::attend_scored_kivi(Tensor q, ")
    assert op["source"].startswith("def attend_scored(")


def test_bytes_of_buffers_sum_to_those_of_the_site(fast, data):
    from kvfx.memory import site_bytes

    sizes = {
        operand["value"]: operand["bytes"]
        for detail in data["details"].values()
        for operand in detail["operands"]
        if operand.get("buffer")
    }
    assert sum(sizes.values()) == site_bytes(fast.plan.sites[0], 1, 4096)


def test_every_pass_is_a_step(fast, data):
    steps = data["steps"]
    assert [(step["program"], step["name"]) for step in steps] == [
        (step.program, step.name) for step in fast.trail.steps
    ]
    assert all(step["summary"] and step["levels"] for step in steps)
    insert = next(s for s in steps if (s["program"], s["name"]) == ("decode", "insert-cache"))
    assert insert["hits"] == [["decode kivi", 2]]
    layers = insert["parts"][0]
    assert (layers["title"], layers["count"]) == ("model.layers.0-1", 2)
    assert "+%site_0_k_codes: i16[B,2,C,8,32]" in layers["lines"]
    assert any(line.startswith("-%: f32[B,4,1,32] = kvfx.attention(") for line in layers["lines"])


def test_a_diff_has_every_line_of_its_layer(fast, data):
    """Nothing is lost: context and removed lines are the text before, context and added after."""
    step = next(step for step in data["steps"] if step["name"] == "match-attention")
    assert [part["count"] for part in step["parts"]] == [2]
    part = step["parts"][0]
    for marks, text in (
        (" -", fast.trail["match-attention"].before),
        (" +", fast.trail["match-attention"].after),
    ):
        lines = [line[1:] for line in part["lines"] if line[0] in marks]
        expected = [re.sub(r"%\d+", "%", line) for line in text.splitlines() if "layers.0" in line]
        assert [line for line in lines if "layers.0" in line] == expected


def test_layers_of_two_kinds_are_two():
    fast = kvfx.compress(tiny_gemma3(), kvfx.SnapKV(budget=0.5), compile=False, verify=False)
    data = page_data(Subject("Gemma", "SnapKV", "compress", fast.trail, fast.raised,
                             fast.graphs, fast.plan, fast.report))  # fmt: skip
    assert [(kind["name"], kind["count"]) for kind in data["kinds"]][:2] == [
        ("model.layers.0-2", 3),
        ("model.layers.3", 1),
    ]


def test_what_differs_between_equal_layers_is_listed():
    fast = kvfx.compress(
        tiny_llama(layers=3), kvfx.PyramidKV(budget=0.5), compile=False, verify=False
    )
    data = page_data(Subject("Llama", "PyramidKV", "compress", fast.trail, fast.raised,
                             fast.graphs, fast.plan, fast.report))  # fmt: skip
    kind = data["kinds"][0]
    assert (kind["name"], kind["count"]) == ("model.layers.0-2", 3)
    layer = next(one for one in kind["differences"] if one["attribute"] == "layer")
    assert layer["values"] == [
        ["0", "model.layers.0"], ["1", "model.layers.1"], ["2", "model.layers.2"],
    ]  # fmt: skip
    row = data["report"]["rows"][0]
    assert row["count"] == 3
    assert len(row["entries"]) == 3


@pytest.mark.slow
def test_thirty_layers_are_shown_once(tmp_path):
    path = tmp_path / "thirty.html"
    kvfx.explain(tiny_llama(layers=30), kvfx.SnapKV(budget=0.5), html=path)
    data = data_in(path.read_text("utf-8"))
    assert path.stat().st_size < 600_000
    assert data["by"] == "explain"
    assert [(kind["name"], kind["count"]) for kind in data["kinds"]] == [
        ("model.layers.0-29", 30),
        ("", 1),
    ]
    assert max(len(step["parts"]) for step in data["steps"]) <= 3
    assert len(data["report"]["sites"]) == 30
    assert len(data["report"]["rows"]) == 1


class Wrapped(nn.Module):
    """A module whose child has a name that no page may take for markup."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(ODD, inner)

    def forward(self, x):
        """What the child gives."""
        return getattr(self, ODD)(x)


def test_names_are_escaped(tmp_path):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.gate_proj = Wrapped(mlp.gate_proj)
    path = tmp_path / "odd.html"
    kvfx.explain(model, kvfx.Full(), html=path)
    html = path.read_text("utf-8")
    assert "<script>alert" not in html
    data = data_in(html)
    assert any(ODD in line for step in data["steps"] for part in step["parts"]
               for line in part["lines"])  # fmt: skip
    drawings = [drawing for drawing in data["drawings"].values() if "alert" in drawing]
    assert drawings
    assert not any("<script" in drawing for drawing in drawings)


def test_texts_cannot_end_the_data():
    html = page_html(page_data(Subject(f"</script>{ODD}", ODD, "explain", Trail())))
    assert html.count("</script>") == 2
    assert data_in(html)["model"] == f"</script>{ODD}"


def test_a_refused_policy_has_a_page_with_the_reason(tmp_path):
    path = tmp_path / "refused.html"
    with pytest.raises(UnsupportedShape):
        kvfx.explain(tiny_llama(), kvfx.KIVI(bits=4), html=path)
    data = data_in(path.read_text("utf-8"))
    assert data["refusal"]["error"] == "UnsupportedShape"
    assert "head_dim 16 is not a multiple of group_size 32" in data["refusal"]["lines"][0]
    assert data["report"] is None
    assert data["drawings"] == {}
    assert "match-attention" in [step["name"] for step in data["steps"]]


def test_a_refused_model_has_a_page_with_its_sites(tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_llama, "create_causal_mask", every_third)
    path = tmp_path / "refused.html"
    with pytest.raises(UnmatchedAttention):
        kvfx.explain(tiny_llama(), kvfx.Full(), html=path)
    data = data_in(path.read_text("utf-8"))
    assert data["refusal"]["error"] == "UnmatchedAttention"
    assert any("self_attn" in line for line in data["refusal"]["lines"])
    assert any(miss["reason"] for step in data["steps"] for miss in step["misses"])


def every_third(config, inputs_embeds, **_):
    """A causal mask that shows each row itself and every third token: no family has it."""
    rows = torch.arange(inputs_embeds.shape[1])
    seen = (rows <= rows[:, None]) & ((rows % 3 == 0) | (rows == rows[:, None]))
    return seen[None, None].expand(inputs_embeds.shape[0], 1, -1, -1)


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_load_model", lambda _: tiny_llama())
    path = tmp_path / "x.html"
    done = CliRunner().invoke(cli.app, ["explain", "m", "-p", "snapkv-25%", "--html", str(path)])
    assert done.exit_code == 0, done.output
    assert data_in(path.read_text("utf-8"))["report"] is not None
    assert "all 2 sites" in done.output
    path.unlink()
    done = CliRunner().invoke(cli.app, ["explain", "m", "-p", "kivi-4bit", "--html", str(path)])
    assert done.exit_code == 1
    assert data_in(path.read_text("utf-8"))["refusal"]["error"] == "UnsupportedShape"


def test_notebooks_show_the_report(fast):
    html = fast._repr_html_()
    assert html == fast.report._repr_html_()
    assert "<td>model.layers.0-1.self_attn  x2</td>" in html
    assert Tags(html).found[0][0] == "p"


def test_a_wheel_contains_the_page():
    """The data files are in the room, and the patterns of the packaging name them."""
    from fnmatch import fnmatch
    from importlib.resources import files
    from pathlib import Path

    project = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    patterns = re.search(r'^"\*" = \[(.*)\]$', project, re.MULTILINE).group(1)
    for name in ("page.html", "page.css", "page.js"):
        assert files("kvfx.page").joinpath(name).is_file()
        assert any(fnmatch(name, pattern.strip(' "')) for pattern in patterns.split(","))


def test_a_phi_has_a_page_too(tmp_path):
    kvfx.explain(tiny("phi3"), kvfx.StreamingLLM(budget=0.5), html=tmp_path / "phi.html")
    data = data_in((tmp_path / "phi.html").read_text("utf-8"))
    assert data["kinds"][0]["count"] == 2
