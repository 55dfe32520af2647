"""`calibrate`: statistics are those of the model's eager attention; files belong to one model."""

from __future__ import annotations

import importlib
import math
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from kvfx import calibration
from kvfx.calibration import (
    BIT_PAIRS,
    LEAST_TOKENS,
    SHAPES,
    Calibration,
    calibrate,
    fingerprint,
)
from kvfx.calibration_prompts import default_prompts, texts
from kvfx.capture import capture
from kvfx.errors import CalibrationError, CaptureError, InputError
from kvfx.kernels.kivi import quantizer
from kvfx.pass_manager import run_passes
from kvfx.passes.insert_probes import EVICTION_GRID, GROUP_SIZE, ROWS, STATISTICS, STEPS
from kvfx.passes.pipeline import raise_passes
from kvfx.testing.text import passages
from kvfx.testing.tiny import VOCAB, tiny, tiny_gemma3, tiny_llama, tiny_mistral

# kv_heads of a tiny Llama with 4 heads: multi-head, grouped, multi-query
KV_HEADS = [4, 2, 1]
TOKENS = (LEAST_TOKENS, 101)


def ids(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


def prompts() -> list[torch.Tensor]:
    return [ids(tokens, seed) for seed, tokens in enumerate(TOKENS)]


@cache
def llama():
    """A tiny Llama that no test changes, so that it is captured once."""
    return tiny_llama()


@cache
def llama_calibration():
    return calibrate(llama(), prompts())


def sites_of(model):
    return run_passes(capture(model), raise_passes(), None).sites


def near(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


def eager(model, row, monkeypatch):
    """What eager attention of HuggingFace is given and gives, per layer: q, k, v, weights [H, ...]
    in fp64.
    """
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    original, calls = module.eager_attention_forward, []

    def recorder(attention, q, k, v, *args, **kwargs):
        out, weight = original(attention, q, k, v, *args, **kwargs)
        calls.append([x[0].double() for x in (q, k, v, weight)])
        return out, weight

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", recorder)
        model.set_attn_implementation("eager")
        model(row[None], use_cache=False)
    return calls


def curve(score):
    ordered, n = score.sort(descending=True).values, len(score)
    tokens = [math.ceil(g * n / STEPS) for g in range(1, STEPS + 1)]
    return torch.stack([ordered[:count].sum() for count in tokens]) / score.sum()


def relative(found, expected):
    return (found - expected).norm() / expected.norm()


def coarse(x, full, bits, dim):
    """The first `full` tokens of x [K, T, D] through KIVI's quantizer, group by group."""
    x = x.float().clone()
    size = full if dim == 1 else x.shape[2]
    for start in range(0, size, GROUP_SIZE):
        tile = (
            x[:, start : start + GROUP_SIZE]
            if dim == 1
            else x[:, :full, start : start + GROUP_SIZE]
        )
        tile.copy_(quantizer.dequantize(*quantizer.quantize(tile.clone(), bits, dim)))
    return x.double()


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_statistics_are_those_of_eager_attention(kv_heads, monkeypatch):
    model = tiny_llama(kv_heads=kv_heads, head_dim=40)
    found = calibrate(model, prompts())
    assert found.sites == tuple(f"model.layers.{index}.self_attn" for index in range(2))
    repeat = 4 // kv_heads
    for p, row in enumerate(prompts()):
        for site, (q, k, v, weight) in enumerate(eager(model, row, monkeypatch)):
            past, received = len(row) - ROWS, weight.sum(1)
            near(found.retention[p, site], curve(received.mean(0)))
            near(found.window_retention[p, site], curve(weight[:, past:].sum(1).mean(0)))
            groups = received.unflatten(0, (kv_heads, repeat)).sum(1)
            for head in range(kv_heads):
                near(found.head_retention[p, site, head], curve(groups[head]))
            given = weight[:, past:, :past]
            near(found.entropy[p, site], -torch.xlogy(given, given).sum(-1).mean())
            near(found.variance[p, site], given.var(1).sum(-1).mean())

            wide = v.repeat_interleave(repeat, 0)
            out = (weight @ wide)[:, past:]
            for index, fraction in enumerate(EVICTION_GRID):
                order = groups[:, :past].argsort(-1, descending=True)
                keep = torch.zeros(kv_heads, len(row), dtype=torch.bool)
                keep.scatter_(1, order[:, : math.ceil(fraction * past)], True)
                keep[:, past:] = True
                kept = weight * keep.repeat_interleave(repeat, 0)[:, None]
                kept = kept / kept.sum(-1, keepdim=True)
                near(found.eviction_error[p, site, index], relative((kept @ wide)[:, past:], out))

            full = past // GROUP_SIZE * GROUP_SIZE
            causal = torch.ones(len(row), len(row), dtype=torch.bool).tril()
            for index, (k_bits, v_bits) in enumerate(BIT_PAIRS):
                rough_k = coarse(k, full, k_bits, 1).repeat_interleave(repeat, 0)
                rough_v = coarse(v, full, v_bits, 2).repeat_interleave(repeat, 0)
                score = (q @ rough_k.mT / math.sqrt(40)).masked_fill(~causal, float("-inf"))
                rough = (score.softmax(-1) @ rough_v)[:, past:]
                # scales, zeros and codes between two numbers may round the other way;
                # `tests/kernels/test_probe.py` compares them on equal operands
                torch.testing.assert_close(
                    found.quantization_error[p, site, index].double(),
                    relative(rough, out),
                    rtol=5e-2,
                    atol=0,
                )


def test_what_is_measured_makes_sense():
    found = llama_calibration()
    assert (found.prompts, found.tokens, len(found.sites)) == (2, max(TOKENS), 2)
    for name in ("retention", "window_retention", "head_retention"):
        value = found.statistic(name)
        assert value.dtype == torch.float64
        assert bool((value.diff(dim=-1) >= 0).all())
        assert bool((value[..., -1] == 1.0).all())
    assert bool((found.eviction_error.diff(dim=-1) < 0).all())
    by_bits = found.quantization_error.unflatten(-1, (3, 3))
    assert bool((by_bits.diagonal(dim1=-2, dim2=-1).diff(dim=-1) > 0).all())
    assert BIT_PAIRS == ((8, 8), (8, 4), (8, 2), (4, 8), (4, 4), (4, 2), (2, 8), (2, 4), (2, 2))
    assert bool((found.similarity.abs() <= 1).all())
    assert bool(((found.key_entropy > 0) & (found.key_entropy <= 1)).all())
    assert tuple(SHAPES) == STATISTICS


def test_the_model_stays_as_it_is():
    model = tiny_llama()
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    calibrate(model, prompts())
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_calibrating_twice_gives_the_same():
    first, second = llama_calibration(), calibrate(tiny_llama(), prompts())
    assert first.fingerprint == second.fingerprint
    for name in STATISTICS:
        assert torch.equal(first.statistic(name), second.statistic(name))


def test_sites_with_a_window_have_no_numbers():
    found = calibrate(tiny_gemma3(kv_heads=2), prompts())
    for name in STATISTICS:
        value = found.statistic(name)
        assert value.shape[:2] == (2, 4)
        assert bool(value[:, :3].isnan().all()), name
        assert bool(value[:, 3].isfinite().all()), name


def test_a_model_of_windows_alone_is_refused():
    with pytest.raises(CalibrationError, match=r"no site that sees its whole past.*window 16"):
        calibrate(tiny_mistral(), prompts())


def test_progress_is_told_after_each_prompt():
    told = []
    calibrate(llama(), prompts(), progress=lambda done, every: told.append((done, every)))
    assert told == [(1, 2), (2, 2)]


def test_prompts_are_cut():
    model, row = llama(), ids(150)
    cut = calibrate(model, [row], tokens=100)
    expected = calibrate(model, [row[:100]])
    assert cut.tokens == expected.tokens == 100
    assert torch.equal(cut.retention, expected.retention)


class Words:
    """A tokenizer with one token per word, and a token before every text."""

    def __call__(self, text, **_):
        return {"input_ids": [1] + [3 + len(word) % 90 for word in text.split()]}


def test_texts_are_tokenized():
    model, text = llama(), default_prompts()[0]
    row = torch.tensor(Words()(text)["input_ids"])
    found = calibrate(model, [text], tokenizer=Words(), tokens=100)
    assert torch.equal(found.retention, calibrate(model, [row], tokens=100).retention)


def test_the_built_in_prompts_fill_their_tokens():
    found = calibrate(llama(), tokenizer=Words(), tokens=200)
    assert (found.prompts, found.tokens) == (8, 200)
    assert not found.retention.isnan().any()
    # eight kinds of text, not one
    assert len({float(value) for value in found.retention[:, 0, 10]}) == 8


def test_the_built_in_prompts_are_not_what_is_evaluated():
    def runs(text, words=8):
        found = text.split()
        return {tuple(found[n : n + words]) for n in range(len(found) - words + 1)}

    evaluated = runs(" ".join(passages()))
    assert len(texts()) == 16
    for text in texts():
        assert not runs(text) & evaluated
        assert len(text) > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "give at least one"),
        ({"prompts": ["some text"]}, "calibrate needs tokenizer="),
        ({"prompts": None}, "calibrate needs tokenizer="),
        ({"prompts": [ids(99), ids(63)]}, "prompt 1 has 63 tokens: 64 are needed"),
        ({"prompts": [ids(99)[None]]}, r"shape \[1, 99\] and dtype torch.int64 is no row"),
        ({"prompts": [ids(99).float()]}, r"dtype torch.float32 is no row"),
        ({"prompts": [ids(99)], "tokens": 63}, "64 or more are needed"),
        ({"prompts": [ids(99)], "tokens": 513}, "the model reads 512 tokens at most"),
    ],
    ids=["none", "text", "built-in", "short", "matrix", "floats", "few", "beyond"],
)
def test_inputs_that_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        calibrate(llama(), **change)


def test_what_is_no_decoder_is_refused():
    with pytest.raises(CaptureError, match="not a transformers model"):
        calibrate(torch.nn.Linear(2, 2), prompts())


def test_save_and_load(tmp_path):
    model = tiny_gemma3()
    saved, path = calibrate(model, prompts()), tmp_path / "gemma.safetensors"
    saved.save(path)
    found = Calibration.load(str(path))
    for name in ("model", "fingerprint", "prompts", "tokens", "sites"):
        assert getattr(found, name) == getattr(saved, name)
    for name in STATISTICS:
        torch.testing.assert_close(
            found.statistic(name), saved.statistic(name), rtol=0, atol=0, equal_nan=True
        )
        assert found.statistic(name).dtype == saved.statistic(name).dtype
    found.check(model, sites_of(model))
    assert [entry.name for entry in tmp_path.iterdir()] == ["gemma.safetensors"]


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    found, path = llama_calibration(), tmp_path / "c"
    found.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(calibration.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        found.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("kind", ["other", "cut", "text", "missing", "folder", "older", "partial"])
def test_files_that_are_no_calibration_are_refused(kind, tmp_path):
    found, path = llama_calibration(), tmp_path / "c"
    found.save(path)
    whole = path.read_bytes()
    messages = {"other": "another safetensors file", "older": "'kvfx calibration 0'"}
    if kind == "other":
        save_file({"weight": torch.ones(2)}, path)
    elif kind == "cut":
        path.write_bytes(whole[:-100])
    elif kind == "text":
        path.write_text("not a tensor in sight")
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path = tmp_path
    elif kind == "older":
        path.write_bytes(whole.replace(b"kvfx calibration 1", b"kvfx calibration 0"))
    else:
        save_file({"entropy": found.entropy}, path, {"kind": calibration.KIND})
    message = messages.get(kind, "cannot be read as a calibration.*kvfx.calibrate")
    with pytest.raises(CalibrationError, match=message):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"prompts":"2"', b'"prompts":"3"'),
        (b'"prompts":"2"', b'"prompts":"x"'),
        (b"[2,2,128]", b"[2,1,256]"),
    ],
    ids=["prompts", "no number", "shape"],
)
def test_files_that_contradict_themselves_are_refused(old, new, tmp_path):
    path = tmp_path / "c"
    llama_calibration().save(path)
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(CalibrationError):
        Calibration.load(path)


OTHERS = {
    "layers": lambda: tiny_llama(layers=3),
    "weights": lambda: tiny("llama", seed=7),
    "kv_heads": lambda: tiny_llama(kv_heads=4),
    "rope": lambda: tiny("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 9e4}}),
    "class": lambda: tiny("qwen2"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_calibration_of_another_model_is_refused(other):
    found, model = llama_calibration(), OTHERS[other]()
    with pytest.raises(CalibrationError) as caught:
        found.check(model, sites_of(model))
    message = str(caught.value)
    assert f"the calibration is of {found.model}" in message
    assert f"the model is {type(model).__name__} with " in message
    assert "calibrate this model" in message


def test_one_changed_parameter_changes_the_fingerprint():
    model = tiny_llama().double()
    before = fingerprint(model, ["a"])
    for parameter in model.parameters():
        parameter.data.mul_(1.0 + 1e-6)
        after = fingerprint(model, ["a"])
        assert after != before
        before = after


def test_other_sites_change_the_fingerprint():
    model = llama()
    assert fingerprint(model, ["a"]) != fingerprint(model, ["b"])


def test_a_saved_model_keeps_its_fingerprint(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    found = calibrate(model, prompts())
    model.config.pad_token_id = 5
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    found.check(again, sites_of(again))


def test_a_wrong_shape_is_refused():
    found = llama_calibration()
    values = {name: found.statistic(name) for name in STATISTICS}
    values["variance"] = values["variance"][:1]
    with pytest.raises(CalibrationError, match=r"variance has shape \[1, 2\].*need \[2, 2\]"):
        Calibration("m", "f", 2, 101, found.sites, **values)


@pytest.mark.slow
def test_smollm2_with_the_built_in_prompts(smollm2):
    model, tokenizer = smollm2
    found = calibrate(model, tokenizer=tokenizer, tokens=128)
    assert (found.prompts, found.tokens, len(found.sites)) == (8, 128, 30)
    for name in STATISTICS:
        assert bool(found.statistic(name).isfinite().all()), name
    # a trained model looks at few tokens, and needs the past
    assert float(found.retention[..., STEPS // 2 - 1].mean()) > 0.7
    errors = found.eviction_error.mean((0, 1))
    assert bool((errors.diff() < 0).all())
