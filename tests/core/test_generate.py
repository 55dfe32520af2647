"""`generate` as users call it: under `Full()` it gives what the original model gives, whatever is
asked.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import kvfx
from kvfx import KIVI, Full, StreamingLLM
from kvfx.errors import UnsupportedOperation
from kvfx.testing.tiny import VOCAB, left_padded, tiny, tiny_gemma3, tiny_llama, tiny_mistral

WINDOW = 8
MODELS = {
    "llama": tiny_llama,
    "mistral": partial(tiny_mistral, WINDOW),
    "gemma3": partial(tiny_gemma3, WINDOW),
    **{name: partial(tiny, name) for name in ("qwen2", "qwen3", "phi3", "olmo2", "smollm3")},
    **{name: partial(tiny, name) for name in ("gemma", "granite", "glm", "cohere", "gpt2", "opt")},
}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
RAGGED = (3, WINDOW, 3 * WINDOW)
EVICTING = {"kivi": KIVI(residual=32), "streaming": StreamingLLM()}


@cache
def pair(name: str = "llama"):
    """A tiny model, and the same with the dense cache."""
    model = MODELS[name]()
    return model, kvfx.compress(model, Full(), compile=False, verify=False)


@cache
def evicting(name: str):
    """A tiny model whose cache cannot be cropped."""
    return kvfx.compress(tiny_llama(head_dim=32), EVICTING[name], compile=False, verify=False)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w98 for the tokens of the tiny models."""
    words = {f"w{token}": token for token in range(VOCAB)}
    backend = Tokenizer(tokenizer_models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", eos_token="w2", padding_side="left"
    )


def assert_same(options: dict[str, object], lengths=(9,), name: str = "llama") -> None:
    """Both models generate the same tokens from the same random state."""
    model, fast = pair(name)
    inputs, out = left_padded(lengths), []
    for either in (model, fast):
        torch.manual_seed(7)
        out.append(either.generate(**inputs, **options))
    assert torch.equal(*out)
    # the comparison is about something: more than the prompt came back
    assert out[0].shape[1] > max(lengths)


@pytest.mark.parametrize("lengths", [(1,), (3 * WINDOW + 1,), RAGGED], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_models(name, lengths):
    assert_same(GREEDY, lengths, name)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_padded_row_generates_what_it_does_alone(name):
    _, fast = pair(name)
    options = {**GREEDY, "min_new_tokens": GREEDY["max_new_tokens"]}
    batch = left_padded(RAGGED)
    together = fast.generate(**batch, **options)
    for row, length in enumerate(RAGGED):
        alone = fast.generate(batch["input_ids"][row : row + 1, -length:], **options)
        assert torch.equal(together[row : row + 1, -alone.shape[1] :], alone)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "max_new_tokens": 12},
        {"do_sample": True, "max_new_tokens": 12, "top_p": 0.7, "temperature": 1.7},
        {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3},
        {**GREEDY, "num_beams": 3},
        {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "max_new_tokens": 12, "num_beams": 2},
        {**GREEDY, "repetition_penalty": 1.5},
        {**GREEDY, "no_repeat_ngram_size": 2},
        {**GREEDY, "min_new_tokens": 12},
        {**GREEDY, "eos_token_id": list(range(50, 60))},
        {**GREEDY, "use_cache": False},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items())[:60],
)
@pytest.mark.parametrize("lengths", [(9,), (2, 11)], ids=str)
def test_every_way_of_decoding_is_the_models(options, lengths):
    assert_same(options, lengths)


def test_beams_in_a_window():
    assert_same({**GREEDY, "num_beams": 3}, RAGGED, "mistral")


class OnlyEven(LogitsProcessor):
    """Forbids odd tokens."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = float("-inf")
        return scores


class AfterFive(StoppingCriteria):
    """Stops after five new tokens; remembers how often it was asked."""

    def __init__(self, prompt: int) -> None:
        self.prompt, self.asked = prompt, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.asked += 1
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.prompt + 5)


def test_logits_processors_and_stopping_criteria():
    _, fast = pair()
    stop = AfterFive(9)
    out = fast.generate(
        **left_padded([9]),
        **GREEDY,
        logits_processor=LogitsProcessorList([OnlyEven()]),
        stopping_criteria=StoppingCriteriaList([stop]),
        eos_token_id=None,
    )
    assert out.shape == (1, 14)
    assert stop.asked == 5
    assert not (out[:, 9:] % 2).any()
    assert_same({**GREEDY, "logits_processor": LogitsProcessorList([OnlyEven()])})


def test_a_text_streamer_prints_what_is_returned(capsys):
    _, fast = pair()
    inputs = left_padded([9])
    out = fast.generate(**inputs, **GREEDY, streamer=TextStreamer(tokenizer(), skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer().decode(out[0, 9:]).split()


def test_an_iterator_streamer_gives_every_word():
    _, fast = pair()
    streamer = TextIteratorStreamer(tokenizer())
    out = fast.generate(**left_padded([9]), **GREEDY, streamer=streamer)
    assert "".join(streamer).split() == tokenizer().decode(out[0]).split()


@pytest.mark.parametrize("lengths", [(9,), (2, 11)], ids=str)
def test_scores_and_logits_are_returned(lengths):
    model, fast = pair()
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    inputs = left_padded(lengths)
    ours = fast.generate(**inputs, **options, output_logits=True)
    theirs = model.generate(**inputs, **options, output_logits=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    for found, expected in zip(
        ours.scores + ours.logits, theirs.scores + theirs.logits, strict=True
    ):
        bound = torch.finfo(torch.float32).eps ** 0.5 * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= bound
    assert ours.past_key_values.get_seq_length() == ours.sequences.shape[1] - 1


def test_generate_again_starts_again():
    _, fast = pair()
    first, other = left_padded([9]), left_padded([5], seed=3)
    expected = fast.generate(**first, **GREEDY)
    fast.generate(**other, **GREEDY)
    assert torch.equal(fast.generate(**first, **GREEDY), expected)


def chat(model, turns, past):
    """The tokens after each turn, one cache passed on from turn to turn."""
    options = {**GREEDY, "max_new_tokens": 7, "return_dict_in_generate": True}
    sequence, out = turns[0][:, :0], []
    for turn in turns:
        sequence = torch.cat((sequence, turn), 1)
        # said, because transformers would take a generated pad token for padding
        everything = torch.ones_like(sequence)
        reply = model.generate(sequence, attention_mask=everything, **options, past_key_values=past)
        sequence, past = reply.sequences, reply.past_key_values
        out.append(sequence)
    return out


def conversation(seed: int) -> list[torch.Tensor]:
    """What a user says in four turns; the third turn is one token."""
    return [left_padded([n], seed=seed + n)["input_ids"] for n in (9, 2 * WINDOW, 1, 5)]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_chat_continues_as_with_the_models_own_cache(name):
    model, fast = pair(name)
    ours, theirs = (
        chat(fast, conversation(3), None),
        chat(model, conversation(3), DynamicCache(config=model.config)),
    )
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_two_conversations_on_one_model_do_not_mix(name):
    _, fast = pair(name)
    alone = [chat(fast, conversation(seed), None)[-1] for seed in (3, 40)]
    options = {**GREEDY, "max_new_tokens": 7, "return_dict_in_generate": True}
    turns = [conversation(seed) for seed in (3, 40)]
    sequences, caches = [talk[0][:, :0] for talk in turns], [None, None]
    for turn in range(4):
        for who in (0, 1):
            sequence = torch.cat((sequences[who], turns[who][turn]), 1)
            everything = torch.ones_like(sequence)
            reply = fast.generate(
                sequence, attention_mask=everything, **options, past_key_values=caches[who]
            )
            sequences[who], caches[who] = reply.sequences, reply.past_key_values
    assert torch.equal(sequences[0], alone[0])
    assert torch.equal(sequences[1], alone[1])


@pytest.mark.parametrize(
    "helper",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_llama(layers=1)}],
    ids=["prompt lookup", "assistant"],
)
def test_assisted_decoding_under_full_changes_no_token(helper):
    model, fast = pair()
    # a prompt that repeats itself, so that the look-up has something to find
    prompt = left_padded([6])["input_ids"].repeat(1, 4)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(fast.generate(prompt, **GREEDY, **helper), expected)


class NoToken(LogitsProcessor):
    """Fails when the first token is about to be chosen."""

    def __call__(self, input_ids, scores):
        raise AssertionError("a token was computed")


@pytest.mark.parametrize("helper", ["prompt_lookup_num_tokens", "assistant_model"])
@pytest.mark.parametrize("name", EVICTING)
def test_assisted_decoding_is_refused_before_any_token(name, helper):
    value = 3 if helper == "prompt_lookup_num_tokens" else tiny_llama(layers=1)
    with pytest.raises(UnsupportedOperation, match=r"(KIVI|StreamingLLM)\(.*use kvfx\.Full\(\)"):
        evicting(name).generate(
            **left_padded([9]),
            **GREEDY,
            **{helper: value},
            logits_processor=LogitsProcessorList([NoToken()]),
        )


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {"do_sample": True, "max_new_tokens": 12},
        {**GREEDY, "num_beams": 3},
        {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3},
    ],
    ids=["greedy", "sample", "beams", "several"],
)
def test_compressed_caches_generate_in_every_way(name, options):
    out = evicting(name).generate(**left_padded([40, 90]), **options)
    assert out.shape[1] > 90


@pytest.mark.parametrize("name", EVICTING)
def test_equal_rows_stay_equal_when_entries_are_flushed_or_evicted(name):
    ids = left_padded([70])["input_ids"]
    options = {"max_new_tokens": 70, "min_new_tokens": 70, "do_sample": False}
    alone = evicting(name).generate(ids, **options)
    assert torch.equal(evicting(name).generate(ids.repeat(2, 1), **options), alone.repeat(2, 1))


def test_the_pipeline_takes_it_for_a_model():
    model, fast = pair()
    texts = ["w5 w7 w9 w11", "w20 w21"]
    options = {"max_new_tokens": 8, "do_sample": False}
    ours, theirs = (
        pipeline("text-generation", model=either, tokenizer=tokenizer())(texts, **options)
        for either in (fast, model)
    )
    assert ours == theirs
    assert ours[0][0]["generated_text"].startswith(texts[0])
