"""Capture: one stateless graph, weights shared, the model as it was, and every refusal in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvfx.capture import capture, check_decoder
from kvfx.errors import CaptureError
from kvfx.graph import Level
from kvfx.testing.tiny import TINY, tiny, tiny_llama

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    )


def encoder() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SMALL, intermediate_size=32))


def headless() -> nn.Module:
    return tiny_llama().get_submodule("model")


def recurrent() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1))


def partly_recurrent() -> nn.Module:
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "linear_attention"]
    return model


def on_two_devices() -> nn.Module:
    model = tiny_llama()
    model.get_submodule("lm_head").to("meta")
    return model


REFUSED = {
    "no model": (lambda: nn.Linear(2, 2), "Linear is not a transformers model: load one with"),
    "encoder-decoder": (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
    "encoder": (encoder, r"BertForMaskedLM is not a decoder \(it cannot generate\)"),
    "headless": (headless, "LlamaModel has no language-model head"),
    "recurrent": (recurrent, "MambaForCausalLM has recurrent layers"),
    "partly recurrent": (
        partly_recurrent,
        r"LlamaForCausalLM has recurrent layers \(linear_attention in layer 1\)",
    ),
    "devices": (on_two_devices, "LlamaForCausalLM has weights on cpu, meta"),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(model, message):
    with pytest.raises(CaptureError, match=message):
        check_decoder(model())


def test_a_model_that_export_cannot_read_is_named():
    model = tiny_llama()
    model.get_submodule("model").forward = lambda **kwargs: 1 / 0
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM cannot be captured by torch\.export"):
        capture(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi"])
def test_the_graph_computes_what_the_model_does(architecture):
    model = tiny(architecture)
    graph = capture(model)
    assert graph.level is Level.CAPTURED
    assert [node.target for node in graph.nodes if node.op == "placeholder"] == [
        "input_ids",
        "position_ids",
        "logits_index",
    ]
    for batch, rows in ((1, 1), (3, 13)):
        ids = torch.randint(3, 99, (batch, rows))
        positions = torch.arange(rows).expand(batch, rows).contiguous()
        index = torch.arange(0, rows, 2)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits[:, index]
            found = graph.module(ids, positions, index)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was(implementation, training):
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    model.train(training)
    ids = torch.randint(3, 99, (2, 9))
    before, flags = model(input_ids=ids).logits, [module.training for module in model.modules()]
    weights = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    capture(model)
    assert model.config._attn_implementation == implementation
    assert [module.training for module in model.modules()] == flags
    assert {n: (p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()} == weights
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_refused_model_is_as_it_was_too():
    model = tiny_llama().train()
    model.set_attn_implementation("eager")
    model.get_submodule("model").forward = lambda **kwargs: 1 / 0
    with pytest.raises(CaptureError):
        capture(model)
    assert (model.config._attn_implementation, model.training) == ("eager", True)


def test_mixed_training_flags_survive():
    model = tiny_llama()
    model.get_submodule("lm_head").train()
    capture(model)
    assert model.get_submodule("lm_head").training
    assert not model.training


def test_weights_are_shared():
    model = tiny_llama()
    graph = capture(model)
    owned = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in graph.module.parameters()} <= owned
    ids, index = torch.tensor([[5, 6, 7]]), torch.tensor([2])
    before = graph.module(ids, torch.arange(3)[None], index)[0]
    with torch.no_grad():
        model.get_submodule("lm_head").get_parameter("weight").mul_(2)
    after = graph.module(ids, torch.arange(3)[None], index)[0]
    torch.testing.assert_close(after, 2 * before)


def test_windows_of_the_config_are_remembered():
    assert capture(tiny("mistral", {"sliding_window": 24})).windows == (24,)
    assert capture(tiny_llama()).windows == ()
    assert "mistral" in TINY


def test_a_model_is_traced_once(monkeypatch):
    """The second graph is another one, and computes the same; what changed is traced again."""
    traced = []
    export = torch.export.export

    def counted(*args, **kwargs):
        traced.append(args[0])
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    model = tiny_llama()
    first, second = capture(model), capture(model)
    assert len(traced) == 1
    assert first.module is not second.module
    assert first.text == second.text
    # values may change: the graph shares the tensors
    model.lm_head.weight.mul_(2.0)
    ids, positions = torch.full((1, 5), 7), torch.arange(5)[None]
    found = capture(model).module(ids, positions, torch.tensor([4]))[0]
    torch.testing.assert_close(found, model(ids, logits_to_keep=1).logits)
    assert len(traced) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: setattr(model.config, "rms_norm_eps", 0.5),
        lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight * 2)),
        lambda model: setattr(model.model.norm, "forward", lambda x: x),
        lambda model: model.model.norm.register_forward_hook(lambda module, args, out: out * 2),
        lambda model: setattr(model.model, "norm", nn.Identity()),
    ],
    ids=["dtype", "config", "weight", "forward", "hook", "module"],
)
def test_a_model_that_changed_is_traced_again(change, monkeypatch):
    model, traced = tiny_llama(), []
    capture(model)
    monkeypatch.setattr("kvfx.capture._trace", traced.append)
    change(model)
    with pytest.raises(AttributeError):
        capture(model)
    assert traced == [model]
