"""`kvfx eval` on a tiny model: tables, JSON, Markdown, and what it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kvfx.cli import app
from kvfx.testing.tiny import VOCAB, tiny_llama

QUICK = ("--windows", "2", "--scored", "5", "--chunk", "2", "--samples", "2", "--lengths", "150")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A Llama of one layer, and a tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(layers=1).save_pretrained(path)
    vocabulary = {"<unk>": 0, **{str(index): index for index in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(str(n * n % VOCAB) for n in range(2000)))
    return str(path)


def call(*arguments: str):
    """The result of `kvfx eval`; what is no KvfxError is raised here."""
    result = CliRunner().invoke(app, ["eval", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_eval_measures_once(folder, text, tmp_path):
    out = str(tmp_path / "results.json")
    options = (folder, *QUICK, "--policies", "StreamingLLM(), kivi-4bit", "--budgets", "0.5,40")
    options = (*options, "--tasks", "perplexity,needle-noise", "--text", text, "--out", out)
    result = call(*options, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    labels = ["Full()", "StreamingLLM(budget=0.5)", "StreamingLLM(budget=40)"]
    assert [each["label"] for each in found] == labels * 2
    assert found[0]["summary"]["kl"] < 1e-8 < found[1]["summary"]["kl"]
    # head_dim 16: the sweep goes on without it
    assert "not measured: KIVI(bits=4): " in result.stderr
    markdown = call(*options, "--markdown").stdout
    assert "| `StreamingLLM(budget=40)` | " in markdown
    assert "**needle-noise, 150 tokens: 2 samples, question hidden" in markdown
    table = call(*options).stdout
    assert "perplexity, 150 tokens: 2 windows of 5 scored tokens, read by 2" in table
    assert len(json.loads((tmp_path / "results.json").read_text())["measurements"]) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budgets", "half"), "expected numbers, separated by commas"),
        (("--budgets", "1.5"), "0 < budget <= 1"),
        (("--tasks", "nedle"), "did you mean needle"),
        (("--text", "no-such-file"), "choose from python, shakespeare"),
        (("--lengths", "1"), "expected integers above 1"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_eval_refuses(folder, options, said):
    result = call(folder, "--policies", "streaming-50%", *options)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
