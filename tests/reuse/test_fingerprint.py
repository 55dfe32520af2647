"""A fingerprint is the same for the same model, and another one for everything that matters."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from kvfx.errors import InputError
from kvfx.geometry import Causal, Rope, Site, Window
from kvfx.reuse.fingerprint import NOTHING, Fingerprint, fingerprint
from kvfx.testing.tiny import tiny, tiny_llama

ROPE = Rope("half", (1.0, 0.1))
SITE = Site(
    0, "layers.0.attn", 4, 2, 16, 16, 0.25, Causal(), ROPE, torch.float32, torch.device("cpu")
)


def tokenizer(words=("a", "b", "?"), template=None):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="?", pad_token="?", chat_template=template
    )


def changed(first, second):
    return {f.name for f in fields(first) if getattr(first, f.name) != getattr(second, f.name)}


def test_the_same_model_loaded_again_has_the_same(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    first = fingerprint(model, tokenizer(), (SITE,))
    second = fingerprint(again, tokenizer(), (SITE,))
    assert first == second
    assert first.digest == second.digest


def test_what_there_is_not_has_a_name():
    found = fingerprint(tiny_llama())
    assert (found.tokenizer, found.template, found.rope) == (NOTHING, NOTHING, NOTHING)
    assert found.dtype == "float32"


@pytest.mark.parametrize("index", [0, 1000, -1])
def test_one_bit_of_one_weight_matters(index):
    model = tiny_llama()
    before = fingerprint(model)
    bits = model.model.layers[1].mlp.up_proj.weight.data.flatten().view(torch.int32)
    bits[index] ^= 1
    assert changed(before, fingerprint(model)) == {"weights"}


def test_a_saved_buffer_matters_and_another_does_not():
    model = tiny_llama()
    before = fingerprint(model)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    assert fingerprint(model) == before
    model.register_buffer("statistics", torch.ones(2), persistent=True)
    assert changed(before, fingerprint(model)) == {"weights"}


def test_equal_weights_in_another_configuration_are_another_model():
    model = tiny_llama()
    before = fingerprint(model)
    model.config.rms_norm_eps = 0.5
    assert changed(before, fingerprint(model)) == {"weights"}


def test_dtype_matters():
    model = tiny("llama")
    before = fingerprint(model)
    after = fingerprint(model.bfloat16())
    assert after.dtype == "bfloat16"
    assert changed(before, after) == {"weights", "dtype"}


@pytest.mark.parametrize(
    "change",
    [
        {"rope": None},
        {"rope": replace(ROPE, style="interleaved")},
        {"rope": replace(ROPE, frequencies=(1.0, 0.1 + 1e-17 * 2))},
        {"mask": Window(16)},
        {"kv_heads": 1},
        {"head_dim": 32},
        {"value_dim": 32},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_every_fact_about_a_site_matters(change):
    model = tiny_llama()
    before, after = (fingerprint(model, None, (s,)) for s in (SITE, replace(SITE, **change)))
    assert changed(before, after) == {"rope"}


def test_words_and_rules_of_the_tokenizer_matter():
    model = tiny_llama()
    before = fingerprint(model, tokenizer())
    assert changed(before, fingerprint(model, tokenizer(("b", "a", "?")))) == {"tokenizer"}
    with_end = tokenizer()
    with_end.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A b", "$A $B", [("b", 1)]
    )
    assert changed(before, fingerprint(model, with_end)) == {"tokenizer"}


def test_a_call_of_the_tokenizer_does_not_matter():
    model, used = tiny_llama(), tokenizer()
    before = fingerprint(model, used)
    used(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert used.backend_tokenizer.padding is not None
    assert fingerprint(model, used) == before


@pytest.mark.parametrize("template", ["{{ messages }}", ""])
def test_the_template_matters(template):
    model = tiny_llama()
    before, after = (fingerprint(model, tokenizer(template=t)) for t in (None, template))
    assert changed(before, after) == {"template"}


def test_weights_that_are_not_loaded_are_refused():
    with torch.device("meta"):
        model = type(tiny_llama())(tiny_llama().config)
    with pytest.raises(InputError, match="meta"):
        fingerprint(model)


def test_the_digest_is_of_every_field():
    names = [field.name for field in fields(Fingerprint)]
    first = Fingerprint(*names)
    digests = {replace(first, **{name: "other"}).digest for name in names}
    assert len(digests | {first.digest}) == len(names) + 1
    assert all(len(digest) == 64 for digest in digests)
