"""`compress` and `explain`: what they take, what they return, what they leave alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import kvfx
from kvfx import KIVI, Full, LayerBudgets, PerLayer, SnapKV, StreamingLLM
from kvfx.errors import (
    CalibrationError,
    InputError,
    PolicyError,
    UnsupportedShape,
    VerificationError,
)
from kvfx.graph import Graph, Level, Miss, call, operand, replace, site_path
from kvfx.pass_manager import Pass, Statistics
from kvfx.planner import Plan
from kvfx.policies import PRESETS
from kvfx.policy import known_budget
from kvfx.provenance import Stamp
from kvfx.testing.tiny import left_padded, tiny, tiny_gemma3, tiny_gpt2, tiny_llama

PROMPT = left_padded([9])
aten = torch.ops.aten


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_compresses_and_generates(name):
    fast = kvfx.compress(tiny_llama(head_dim=32), name, compile=False, verify=False)
    assert fast.plan.policy == PRESETS[name]
    out = fast.generate(**PROMPT, max_new_tokens=5, min_new_tokens=5)
    assert out.shape == (1, 14)


def test_not_strict_compresses_what_it_can():
    with pytest.raises(UnsupportedShape, match="no rotary embedding"):
        kvfx.compress(tiny_gpt2(), StreamingLLM(), compile=False)
    fast = kvfx.compress(tiny_gpt2(), StreamingLLM(), compile=False, strict=False)
    assert [site.store for site in fast.plan.sites] == [Full()] * 2
    assert fast.plan.croppable
    assert "no rotary embedding" in str(fast.report)
    expected = tiny_gpt2().generate(**PROMPT, max_new_tokens=5, do_sample=False)
    assert torch.equal(fast.generate(**PROMPT, max_new_tokens=5, do_sample=False), expected)


def test_windows_keep_their_ring_under_any_policy():
    fast = kvfx.compress(tiny_gemma3(), StreamingLLM(), compile=False)
    assert [type(site.store).__name__ for site in fast.plan.sites] == ["WindowRing"] * 3 + ["Full"]
    assert [site.select for site in fast.plan.sites] == [None] * 3 + [StreamingLLM()]


def test_what_is_no_calibration_is_refused():
    with pytest.raises(CalibrationError, match="is none: write one"):
        kvfx.compress(tiny_llama(), Full(), calibration=[1, 2])


@pytest.mark.parametrize("verify", [True, False])
def test_the_report_says_whether_it_was_verified(verify):
    fast = kvfx.compress(tiny_llama(), Full(), compile=False, verify=verify)
    assert ("not verified" in str(fast.report)) is not verify


def test_explain_says_the_same_without_running():
    model = tiny_llama(head_dim=32)
    policy = PerLayer(KIVI(2), {0: Full()})
    told = str(kvfx.explain(model, policy))
    for word in ("layers.0.self_attn", "layers.1.self_attn", "KIVI(bits=2)", "Full()"):
        assert word in told
    assert isinstance(kvfx.compress(model, policy, compile=False).plan, Plan)


def test_every_step_of_a_program_is_in_the_trail_under_its_name():
    fast = kvfx.compress(tiny_llama(), Full(), compile=False, verify=False)
    assert fast.trail["decode/specialize-rows"].program == "decode"
    assert fast.trail["match-attention"].program == ""


def test_one_model_under_two_policies():
    model = tiny_llama(head_dim=32)
    dense = kvfx.compress(model, Full(), compile=False, verify=False)
    expected = dense(**PROMPT).logits
    coded = kvfx.compress(model, KIVI(2), compile=False, verify=False)
    coded.generate(**PROMPT, max_new_tokens=3)
    assert torch.equal(dense(**PROMPT).logits, expected)
    assert torch.equal(coded(**PROMPT).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("llama", Full()),
        ("llama", StreamingLLM(budget=0.5, interval=3) | KIVI(8, residual=0)),
        ("gemma3_text", Full()),
    ],
    ids=str,
)
def test_the_compiled_model_is_the_eager_one(name, policy):
    model = tiny(name, {"head_dim": 32})
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    prompt = left_padded([9, 30])
    eager, compiled = (
        kvfx.compress(model, policy, compile=compile, verify=False) for compile in (False, True)
    )
    assert torch.equal(compiled.generate(**prompt, **options), eager.generate(**prompt, **options))


def test_a_plan_is_compiled_again(tmp_path):
    """As an object and as a file: the same plan for the same model, without its policy."""
    model = tiny_llama(layers=3)
    policy = LayerBudgets(0.25, (1.5, 1.0, 0.5)) | SnapKV(window=4)
    first = kvfx.compress(model, policy, compile=False, verify=False)
    kvfx.save_plan(first.plan, tmp_path / "plan.json")
    for plan in (first.plan, tmp_path / "plan.json"):
        again = kvfx.compress(model, plan=plan, compile=False, verify=False)
        assert again.plan == first.plan


def test_a_memory_chooses_the_budget():
    """The largest that fits: measured bytes are below it, and those of a larger budget are not."""
    model = tiny_llama()
    fast = kvfx.compress(
        model, StreamingLLM(interval=4), memory=40_000, context=200, compile=False, verify=False
    )
    ids = torch.full((1, 200), 7)
    assert fast(ids).past_key_values.nbytes() <= 40_000
    budget = known_budget(fast.plan.sites[0].select.budget)
    larger = kvfx.compress(
        model, StreamingLLM(budget + 0.01, interval=4), compile=False, verify=False
    )
    assert larger(ids).past_key_values.nbytes() > 40_000


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "give a policy, a plan, or memory= and context="),
        ({"policy": Full(), "plan": "plan.json"}, "a plan was made of a policy"),
        ({"policy": StreamingLLM(), "memory": "1MiB"}, "for how many tokens"),
    ],
    ids=["nothing", "both", "no context"],
)
def test_what_is_to_be_compiled_has_to_be_said(asked, message):
    with pytest.raises(PolicyError, match=message):
        kvfx.compress(tiny_llama(), **asked)


@dataclass(frozen=True)
class WriteOut(Pass):
    """Write every silu out; a wrong one squares the gate.

    Before:  y = silu(x)
    After:   y = mul(x, sigmoid(x))
    """

    wrong: bool = False
    name: ClassVar[str] = "write-out"
    consumes: ClassVar[Level] = Level.CANONICAL
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Rewrite, and miss something."""
        stats.miss(Miss("nothing to see", "layers.0"))
        for node in graph.calls(aten.silu.default):
            x, mark = operand(node, 0), Stamp(site_path(node), "silu", self.name)
            with graph.module.graph.inserting_before(node):
                gate = call(graph, aten.sigmoid.default, (x,), mark)
                found = (gate if self.wrong else x, gate)
                product = call(graph, aten.mul.Tensor, found, mark)
            replace(node, product)
            stats.hit("silu")


class WriteOutLater(WriteOut):
    """The same of raised graphs."""

    name = "write-out-later"
    consumes = produces = Level.RAISED


OWN = pytest.mark.parametrize("own", [WriteOut, WriteOutLater])


@OWN
def test_an_own_pass_runs_once_and_is_seen(own, tmp_path):
    model, step = tiny_llama(), own()
    fast = kvfx.compress(model, Full(), compile=False, passes=(step,))
    (record,) = (each for each in fast.trail.steps if each.name == step.name)
    assert (record.program, record.statistics.hits) == ("", {"silu": 2})
    assert "+%: f32[B,S,112] = sigmoid(%)" in fast.trail[step.name].diff()
    for program in ("prefill", "extend", "decode"):
        assert fast.graph(program).text.count("mlp.act_fn <- silu") == 4
    torch.testing.assert_close(fast(**PROMPT).logits, model(**PROMPT).logits)
    page = fast.save_html(tmp_path / "page.html").read_text("utf-8")
    assert f'"name":"{step.name}"' in page
    for report in (fast.report, kvfx.explain(model, Full(), passes=(step,))):
        assert f"miss ({step.name}): layers.0: nothing to see" in str(report)
    # what was captured is nobody's to change
    again = kvfx.compress(model, Full(), compile=False, verify=False)
    assert "sigmoid" not in again.graph("decode").text


@OWN
def test_a_wrong_own_pass_is_found_and_suspected(own):
    step = own(wrong=True)
    words = rf"(?s)differs from the model.*your own passes ran \({step.name}\), suspect these"
    with pytest.raises(VerificationError, match=words):
        kvfx.compress(tiny_llama(), Full(), compile=False, passes=(step,))


def test_without_own_passes_none_is_suspected(monkeypatch):
    def refuse(captured, raised):
        raise VerificationError("asked")

    monkeypatch.setattr("kvfx.compiler.validate", refuse)
    with pytest.raises(VerificationError, match=r"^asked$"):
        kvfx.compress(tiny_llama(), Full(), compile=False)


def test_a_model_is_raised_and_proven_once(monkeypatch, capsys):
    """Another policy finds its trail whole; what changed is proven again, and own passes are."""
    model, proven = tiny_llama(head_dim=32), []
    monkeypatch.setattr("kvfx.compiler.validate", lambda *graphs: proven.append(graphs))
    first = kvfx.compress(model, Full(), compile=False)
    monkeypatch.setattr(
        "kvfx.compiler.raise_passes", lambda own: own or pytest.fail("raised again")
    )
    monkeypatch.setenv("KVFX_PRINT", "after:match-attention")
    second = kvfx.compress(model, KIVI(4), compile=False)
    assert len(proven) == 1
    assert second.report.verified
    assert second.raised.text == first.raised.text
    assert second.raised.module is not first.raised.module
    names = [step.name for step in first.trail.steps if not step.program]
    assert names == [step.name for step in second.trail.steps if not step.program] != []
    assert "kvfx.attention" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("kvfx.compiler.validate", lambda *graphs: proven.append(graphs))
    kvfx.compress(model, Full(), compile=False, passes=(WriteOut(),))
    kvfx.compress(model, Full(), compile=False)
    assert len(proven) == 2
    model.double()
    kvfx.compress(model, Full(), compile=False)
    assert len(proven) == 3


def test_a_model_that_is_wrong_stays_wrong(monkeypatch):
    """What was refused once is not taken for proven."""
    model = tiny_llama()

    def refuse(captured, raised):
        raise VerificationError("asked")

    monkeypatch.setattr("kvfx.compiler.validate", refuse)
    for _ in range(2):
        with pytest.raises(VerificationError, match="asked"):
            kvfx.compress(model, Full(), compile=False)
    # nor is what nobody asked to be verified
    kvfx.compress(model, Full(), compile=False, verify=False)
    with pytest.raises(VerificationError, match="asked"):
        kvfx.compress(model, Full(), compile=False)


def test_an_own_pass_that_cannot_run_is_refused_before_the_capture(monkeypatch, tmp_path):
    def busy(model):
        raise AssertionError("captured")

    monkeypatch.setattr("kvfx.compiler.held_capture", busy)
    twice, html = (WriteOut(), WriteOut(wrong=True)), tmp_path / "page.html"
    with pytest.raises(InputError, match="there is a pass 'write-out' already"):
        kvfx.compress(tiny_llama(), Full(), passes=twice)
    with pytest.raises(InputError, match="there is a pass 'write-out' already"):
        kvfx.explain(tiny_llama(), Full(), passes=twice, html=html)
    assert "there is a pass" in html.read_text("utf-8")


def test_an_own_pass_may_change_what_keys_are_computed_from():
    """What `CacheLatent` keeps is found behind it: nodes are held by name from then on."""

    class Anew(WriteOutLater):
        name = "anew"

        def run(self, graph: Graph, stats: Statistics) -> None:
            for node in graph.calls(aten.cat.default):
                mark = Stamp(site_path(node), "cat", self.name)
                with graph.module.graph.inserting_before(node):
                    again = call(graph, aten.cat.default, node.args, mark)
                replace(node, again)
                stats.hit("cat")

    fast = kvfx.compress(tiny("deepseek_v3"), kvfx.CacheLatent(), compile=False, passes=(Anew(),))
    assert fast.trail["anew"].statistics.hits
    assert fast.trail["match-latents"].statistics.hits == {"latent 16 + 8 of 144": 2}
