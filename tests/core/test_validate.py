"""Translation validation: a planted mistake is refused, and the message names its site."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvfx.capture import capture
from kvfx.compiler import compress
from kvfx.errors import VerificationError
from kvfx.geometry import Window
from kvfx.graph import Graph
from kvfx.pass_manager import run_passes
from kvfx.passes.match_attention import attention_roots
from kvfx.passes.pipeline import raise_passes
from kvfx.policies import Full
from kvfx.testing.tiny import tiny, tiny_gemma3, tiny_llama
from kvfx.validate import validate


@pytest.fixture(scope="module")
def llama() -> tuple[Graph, Graph]:
    captured = capture(tiny_llama(layers=3))
    return captured, run_passes(captured.copy(), raise_passes(), None)


def attention(graph: Graph, index: int):
    return graph.calls(torch.ops.kvfx.attention.default)[index]


def edit_site(graph: Graph, index: int, **facts) -> None:
    """Let the compiler believe something else about a site."""
    sites = list(graph.sites)
    sites[index] = replace(sites[index], **facts)
    graph.sites = tuple(sites)


def swap(graph: Graph, index: int) -> None:
    q, k, v, *rest = attention(graph, index).args
    attention(graph, index).args = (q, v, k, *rest)


def other_keys(graph: Graph, index: int) -> None:
    q, _, v, *rest = attention(graph, index).args
    attention(graph, index).args = (q, attention(graph, 0).args[1], v, *rest)


def scale(graph: Graph, index: int) -> None:
    edit_site(graph, index, scale=graph.sites[index].scale * 1.05)


def window(graph: Graph, index: int) -> None:
    edit_site(graph, index, mask=Window(9))


def skip(graph: Graph, index: int) -> None:
    node = attention(graph, index)
    node.args = (*node.args[:2], node.args[1], *node.args[3:])


def test_a_correct_rewrite_passes(llama):
    captured, raised = llama
    validate(captured, raised.copy())


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("mistake", [scale, window, swap, other_keys, skip])
def test_a_planted_mistake_is_refused_by_site(llama, mistake, index):
    captured, raised = llama
    wrong = raised.copy()
    mistake(wrong, index)
    with pytest.raises(
        VerificationError, match=rf"model\.layers\.{index}\.self_attn: the \w+ program"
    ):
        validate(captured, wrong)


def test_a_window_that_only_shows_in_the_last_rows_is_found(llama):
    captured, raised = llama
    wrong = raised.copy()
    edit_site(wrong, 1, mask=Window(20))
    with pytest.raises(
        VerificationError, match=r"layers\.1\.self_attn: the (extend|decode) program"
    ):
        validate(captured, wrong)


def test_a_mistake_after_the_last_site_is_found(llama):
    captured, raised = llama
    wrong = raised.copy()
    head = wrong.calls(torch.ops.aten.linear.default)[-1]
    with wrong.module.graph.inserting_after(head):
        doubled = wrong.module.graph.call_function(torch.ops.aten.mul.Tensor, (head, 1.01))
    doubled.meta = dict(head.meta)
    head.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    with pytest.raises(VerificationError, match="the logits of the prefill program"):
        validate(captured, wrong)


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_llama().bfloat16(),
        lambda: tiny_gemma3(),
        lambda: tiny("gpt2"),
        lambda: tiny("cohere"),
    ],
    ids=["bf16", "gemma3", "gpt2", "cohere"],
)
def test_models_pass(model):
    captured = capture(model())
    validate(captured, run_passes(captured.copy(), raise_passes(), None))


def test_verify_false_skips(monkeypatch):
    def refuse(captured, raised):
        raise VerificationError("asked")

    monkeypatch.setitem(compress.__globals__, "validate", refuse)
    model = tiny_llama()
    with pytest.raises(VerificationError, match="asked"):
        compress(model, Full(), compile=False)
    compress(model, Full(), compile=False, verify=False)


def test_a_site_that_is_none_in_the_capture_shows_in_the_logits(llama, monkeypatch):
    """As where a user's own pass spells an attention anew."""
    captured, raised = llama
    known = attention_roots(captured)
    known.popitem()
    monkeypatch.setattr("kvfx.validate.attention_roots", lambda graph: known)
    validate(captured, raised)
    wrong = raised.copy()
    swap(wrong, 2)
    with pytest.raises(VerificationError, match="the logits of the prefill program differs"):
        validate(captured, wrong)
