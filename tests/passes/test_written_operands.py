"""The operands of an attention that is written out: sinks as a gate, and scores that escape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.match_attention import MatchAttention

RAISE = [Canonicalize(), MatchAttention()]


class Gated(nn.Module):
    """Granite's sinks: the output times what the softmax leaves to the keys. `given` says what else
    is made of scores and outputs.
    """

    def __init__(self, given=lambda scores, out, logits: out):
        super().__init__()
        self.register_buffer("logits", torch.tensor([0.5, -1.0, 2.0]))
        self.given = given

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((q.shape[2], q.shape[2]), torch.finfo(torch.float32).min).triu(1)
        scores = q @ k.transpose(2, 3) * 0.25 + mask[None, None]
        return self.given(scores, scores.softmax(-1) @ v, self.logits.view(1, -1, 1))


def gated(scores, out, logits):
    return out * torch.sigmoid(torch.logsumexp(scores, -1) - logits).unsqueeze(-1)


def given() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, 7, 8) for _ in range(3))


def test_a_gate_behind_is_sinks(exported, apply, run):
    module, inputs = Gated(gated), given()
    graph = exported(module, *inputs)
    assert apply(graph, RAISE).hits == {"softmax": 1}
    (node,) = graph.calls(torch.ops.kvfx.attention.default)
    assert node.kwargs["sinks"].target == "logits"
    # the gate went into the op
    assert "sigmoid" not in graph.text
    torch.testing.assert_close(run(graph, *inputs)[0], module(*inputs))


def by_tokens(scores, out, logits):
    return out * torch.sigmoid(torch.logsumexp(scores, -1) - scores[..., 0]).unsqueeze(-1)


def of_something_else(scores, out, logits):
    return out * torch.sigmoid(torch.logsumexp(2 * scores, -1) - logits).unsqueeze(-1)


def read_again(scores, out, logits):
    return out + scores.amax(-1, keepdim=True)


@pytest.mark.parametrize("escapes", [by_tokens, of_something_else, read_again])
def test_scores_that_are_used_elsewhere_are_refused(exported, apply, escapes):
    """Behind a cache, such a use would see new rows only."""
    graph = exported(Gated(escapes), *given())
    apply(graph, RAISE)
    (miss,) = graph.missed.values()
    assert "the scores of attention are used elsewhere too" in miss.reason
    assert not graph.calls(torch.ops.kvfx.attention.default)
