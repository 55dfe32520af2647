"""A compressed model in lm-evaluation-harness: what it generates, what its log-likelihoods are, and
what the harness reads from it.
"""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kvfx
from kvfx import KIVI, Full, SnapKV, StreamingLLM
from kvfx.errors import CapacityExceeded
from kvfx.testing.tiny import VOCAB, tiny_llama

simple_evaluate = pytest.importorskip("lm_eval").simple_evaluate
Instance = pytest.importorskip("lm_eval.api.instance").Instance
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
Dataset = pytest.importorskip("datasets").Dataset

LENGTHS = (63, 40, 100)
NEW, STOP = 8, "47"
SPECIAL = UNKNOWN, PADDING, END = "<unk>", "<pad>", "<end>"
STREAMING = StreamingLLM(budget=16, interval=8)
POLICIES = (KIVI(bits=2, residual=32), STREAMING, SnapKV(budget=0.25))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama(layers=2, head_dim=32)


@pytest.fixture(scope="module")
def tokenizer():
    """Numbers as tokens."""
    words = [*SPECIAL, *(str(n) for n in range(len(SPECIAL), VOCAB))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNKNOWN, pad_token=PADDING, eos_token=END
    )


@pytest.fixture(scope="module")
def compressed(model):
    """The model under a policy, rewritten once."""
    return cache(lambda policy: kvfx.compress(model, policy, compile=False))


def prompts() -> list[str]:
    random = Random(0)
    return [" ".join(str(random.randrange(len(SPECIAL), VOCAB)) for _ in range(n)) for n in LENGTHS]


def generated(harness) -> list[str]:
    options = {"until": [STOP], "max_gen_toks": NEW}
    asked = [
        Instance("generate_until", {}, (prompt, options), n) for n, prompt in enumerate(prompts())
    ]
    return harness.generate_until(asked, disable_tqdm=True)


def log_likelihoods(harness) -> list[float]:
    """Of the second half of every prompt."""
    halves = [
        (prompt[: len(prompt) // 2].rsplit(" ", 1)[0], prompt[len(prompt) // 2 :])
        for prompt in prompts()
    ]
    asked = [Instance("loglikelihood", {}, each, n) for n, each in enumerate(halves)]
    return [value for value, _ in harness.loglikelihood(asked, disable_tqdm=True)]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_harness_generates_what_the_model_does(policy, compressed, tokenizer):
    fast = compressed(policy)
    expected = []
    for prompt in prompts():
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = fast.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        words = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append(words.split(STOP)[0])
    alone = generated(HFLM(pretrained=fast, tokenizer=tokenizer, batch_size=1))
    assert alone == expected
    assert all(len(each.split()) >= 1 for each in alone)
    # padded on the left
    assert generated(HFLM(pretrained=fast, tokenizer=tokenizer, batch_size=3)) == expected


def test_compression_is_seen(model, compressed, tokenizer):
    dense = generated(HFLM(pretrained=model, tokenizer=tokenizer))
    assert generated(HFLM(pretrained=compressed(Full()), tokenizer=tokenizer)) == dense
    found = generated(HFLM(pretrained=compressed(STREAMING), tokenizer=tokenizer))
    assert found != dense
    # the attention of the prompt is dense: so is the first token
    assert [each.split()[:1] for each in found] == [each.split()[:1] for each in dense]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_log_likelihoods_are_those_of_the_dense_model(policy, model, compressed, tokenizer):
    dense = log_likelihoods(HFLM(pretrained=model, tokenizer=tokenizer))
    found = log_likelihoods(HFLM(pretrained=compressed(policy), tokenizer=tokenizer))
    assert found == pytest.approx(dense, rel=1e-6)


def test_log_likelihoods_of_prompts_in_chunks_are_not(model, tokenizer):
    dense = log_likelihoods(HFLM(pretrained=model, tokenizer=tokenizer))
    policy = StreamingLLM(budget=0.25, interval=8)
    fast = kvfx.compress(model, policy, compile=False, prefill_chunk=8)
    alone = log_likelihoods(HFLM(pretrained=fast, tokenizer=tokenizer))
    assert all(abs(a - b) > 0.1 for a, b in zip(alone, dense, strict=True))
    # batches are padded on the right without a mask, and a share of the padding is kept as well
    together = log_likelihoods(HFLM(pretrained=fast, tokenizer=tokenizer, batch_size=3))
    assert together != pytest.approx(alone, rel=1e-3)


def test_contexts_have_to_fit(model, tokenizer):
    fast = kvfx.compress(model, Full(), compile=False, max_length=60)
    with pytest.raises(CapacityExceeded, match="do not fit into max_length=60"):
        generated(HFLM(pretrained=fast, tokenizer=tokenizer))
    # the harness cuts contexts off on the left
    found = generated(HFLM(pretrained=fast, tokenizer=tokenizer, max_length=60))
    assert len(found) == len(LENGTHS)


def test_a_task_is_scored(model, compressed, tokenizer):
    harness = HFLM(pretrained=compressed(Full()), tokenizer=tokenizer, batch_size=2)
    answers = generated(harness)
    rows = [
        {"prompt": prompt, "answer": answer}
        for prompt, answer in zip(prompts(), (*answers[:-1], "none"), strict=True)
    ]
    task = {
        "task": "said",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [STOP], "max_gen_toks": NEW},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    found = simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0, log_samples=False)
    assert found["results"]["said"]["exact_match,none"] == pytest.approx(2 / 3)
    # what a report of the harness says about the model
    info = harness.get_model_info()
    assert info["model_num_parameters"] == sum(each.numel() for each in model.parameters())
    assert info["model_dtype"] == torch.float32
    assert harness.max_length == model.config.max_position_embeddings
