"""The command line, on a tiny model with a tiny tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import kvfx
from kvfx.cli import _split, _turn, app
from kvfx.errors import KvfxError
from kvfx.testing.tiny import VOCAB, tiny_llama

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "the", "of", "and")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A Llama of one layer, and a tokenizer that knows some words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(layers=1).save_pretrained(path)
    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), VOCAB))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return str(path)


def call(*arguments: str, typed: str | None = None):
    """The result of a command; what is no KvfxError is raised here."""
    result = CliRunner().invoke(app, list(arguments), input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_run(folder):
    result = call("run", folder, "the of", "--policy", "full", "-n", "5", "--no-compile")
    assert result.exit_code == 0
    text = result.stdout.split("\n\n")
    assert len(text[0].split()) >= 4
    assert "Full(): prefill, extend, decode; backend reference; verified" in text[1]
    assert "5 tokens; first after " in text[1]
    # "user : the of </s> assistant :" and 4 of the 5 new tokens were read
    assert "allocated for 11 tokens (dense " in text[1]
    assert "at 4,096 tokens 1.0 MiB (dense 1.0 MiB)" in text[1]


def test_run_streams_what_generate_gives(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("the of", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 2:]
    options = ("--raw", "--no-compile", "--no-verify", "-p", "full", "-n", "6")
    result = call("run", folder, "the of", *options)
    said = tokenizer.decode(expected, skip_special_tokens=True)
    assert result.stdout.split("\n\n")[0].split() == said.split()


def test_run_can_sample(folder):
    options = ("-p", "full", "--no-compile", "--no-verify", "-n", "3", "--temperature", "0.7")
    assert call("run", folder, "the", *options).exit_code == 0


def test_run_refuses_an_empty_prompt(folder):
    result = call("run", folder, "", "--raw", "-p", "full", "--no-compile", "--no-verify")
    assert result.exit_code == 1
    assert result.stderr == "error: the prompt has no tokens: say something\n"


def test_run_respects_max_length(folder):
    options = ("--no-compile", "--no-verify", "-p", "full", "-n", "9", "--max-length", "8")
    result = call("run", folder, "the of", *options)
    assert result.exit_code == 1
    assert "do not fit into max_length=8" in result.stderr


def test_chat_continues_one_cache(folder):
    options = ("-p", "full", "-n", "4", "--no-compile", "--no-verify")
    result = call("chat", folder, *options, typed="the\nof and\n\n/exit\n")
    assert result.exit_code == 0
    turns = [line for line in result.stdout.splitlines() if line.startswith("cache ")]
    counts = [int(line.split(" tokens ")[0].split()[-1]) for line in turns]
    # 6 tokens of the first turn, 3 of the 4 new ones; then the last new one, "</s>" and 7 of a turn
    assert counts == [9, 9 + 1 + 1 + 7 + 3]


def test_chat_sees_what_one_long_prompt_would(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ("-p", "full", "-n", "4", "--no-compile", "--no-verify")
    result = call("chat", folder, *options, typed="the\nof and\n")
    said = [line.removeprefix("> ") for line in result.stdout.splitlines() if line[:2] == "> "]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids, expected = torch.zeros(1, 0, dtype=torch.int64), []
    for line in ("user : the </s> assistant :", "</s> user : of and </s> assistant :"):
        new = tokenizer(line, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = torch.cat((ids, new), 1)
        start = ids.shape[1]
        ids = model.generate(ids, max_new_tokens=4, do_sample=False)
        expected.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert [line.split() for line in said[:2]] == [line.split() for line in expected]


@pytest.mark.parametrize(
    ("last", "text"),
    [("</s>", " user : of </s> assistant :"), ("the", " </s> user : of </s> assistant :")],
    ids=["closed", "cut off"],
)
def test_a_reply_is_closed_once(folder, last, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = tokenizer(last, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert _turn(tokenizer, "of", said) == text


def test_chat_needs_a_template(folder, tmp_path):
    from shutil import copytree

    plain = copytree(folder, tmp_path / "plain")
    for file in plain.glob("chat_template*"):
        file.unlink()
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    result = call("chat", str(plain))
    assert result.exit_code == 1
    assert "has no chat template: use `kvfx run --raw`" in result.stderr


def test_explain(folder):
    result = call("explain", folder, "--policy", "StreamingLLM(budget=0.5)")
    assert result.stdout.startswith("StreamingLLM(budget=0.5): prefill, extend, decode, compact;")
    assert "256 -> 132" in result.stdout


def test_budgets_in_bytes(folder):
    """As an option, and in the policy; both need to know for how many tokens."""
    room = ("--context", "300")
    found = [
        call("explain", folder, "--policy", "StreamingLLM()", "--memory", "40KiB", *room, "--json"),
        call("explain", folder, "--policy", "StreamingLLM(budget='40KiB')", *room, "--json"),
    ]
    documents = [json.loads(result.stdout) for result in found]
    assert documents[0]["policy"] == documents[1]["policy"] != "StreamingLLM(budget=0.25)"
    result = call("explain", folder, "--policy", "StreamingLLM()", "--memory", "40KiB")
    assert result.exit_code == 1
    assert "for how many tokens" in result.output


def test_explain_json(folder):
    data = json.loads(call("explain", folder, "--policy", "full", "--json").stdout)
    assert data["policy"] == "Full()"
    assert data["sites"][0]["before"] == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "/nowhere"), "error: '/nowhere' is no file, folder or known name. MODEL is"),
        (("explain", "FOLDER", "-p", "ful"), "error: there is no policy 'ful': did you mean"),
        (("explain", "FOLDER", "-p", "KIVI(bit=4)"), "error: KIVI has no field 'bit': did you"),
        (("explain", "FOLDER", "-p", "KIVI()"), "error: model.layers.0.self_attn: KIVI(bits=2"),
        (("opt", "FOLDER", "--passes", "match-atention"), "error: there is no raising pass"),
        (("opt", "FOLDER", "--passes", "match-masks"), "error: pass 'match-masks' takes a"),
        (("bench", "decode", "--lengths", "1,x"), "error: --lengths '1,x': expected integers"),
        (("bench", "decode", "--policies", "fulll"), "error: there is no policy 'fulll'"),
        (
            ("bench", "decode", "--model", "FOLDER", "--random-weights", "tiny"),
            "error: --model and --random-weights exclude each other: give one of them",
        ),
        (
            ("bench", "decode", "--model", "FOLDER", "--fill", "random"),
            "error: --fill and --max-batch go with --random-weights: add it, or drop them",
        ),
        (("bench", "decode", "--max-batch", "2"), "error: --fill and --max-batch go with"),
        (("bench", "decode", "--random-weights", "tini"), "error: --random-weights 'tini' is not"),
        (("bench", "kernels", "--ops", "attend", "--check-only"), "error: --ops: there is no op"),
        (("bench", "kernels", "--shapes", "B1", "--check-only"), "error: --shapes 'B1': expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_one_line(folder, arguments, message):
    result = call(*(folder if word == "FOLDER" else word for word in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_policies():
    result = call("policies")
    for word in ("KIVI", "StreamingLLM", "select", "kivi-4bit", "KIVI(k_bits=8, v_bits=4)"):
        assert word in result.stdout


def test_opt_diff(folder):
    result = call("opt", folder, "--passes", "canonicalize,match-attention")
    assert "+++ after match-attention" in result.stdout
    assert "+%: f32[B,4,S,16] = kvfx.attention(" in result.stdout
    assert "match-attention" in result.stderr


def test_opt_texts(folder):
    every = call("opt", folder, "--print", "after-all").stdout
    changed = call("opt", folder, "--print", "after-change").stdout
    assert every.count("// after ") == 4
    assert 1 <= changed.count("// after ") <= 4
    assert "kvfx.attention(" in changed


def test_opt_statistics(folder):
    result = call("opt", folder, "--passes", "canonicalize", "--print", "statistics")
    assert result.stdout.splitlines()[1].split()[0] == "canonicalize"
    assert result.stderr == ""


def test_bench_decode(folder):
    arguments = ("bench", "decode", "--model", folder, "--lengths", "16,48", "--policies", "full")
    fast = ("--no-compile", "--rounds", "1", "--new-tokens", "2")
    result = call(*arguments, *fast)
    assert result.exit_code == 0
    assert "48       kvfx full" in result.stdout
    data = json.loads(call(*arguments, *fast, "--json").stdout)
    assert [row["contender"] for row in data["rows"]] == ["HF default", "kvfx full"] * 2


def test_bench_random_weights():
    arguments = ("bench", "decode", "--random-weights", "tiny", "--lengths", "24", "--rounds", "1")
    fast = ("--policies", "full", "--no-compile", "--new-tokens", "2", "--fill", "random")
    result = call(*arguments, *fast)
    assert result.exit_code == 0
    assert "24       kvfx full" in result.stdout
    assert "caches filled with random entries: nothing was read" in result.stdout
    data = json.loads(call(*arguments, *fast, "--json").stdout)
    assert data["max_batch"] == 1 or torch.cuda.is_available()
    assert data["fill"] == "random"


SMALL = ("bench", "kernels", "--check-only", "--shapes", "B2-H4-K2-D64-T161-ragged")


def test_bench_kernels(tmp_path):
    path = tmp_path / "kernels.json"
    result = call(*SMALL, "--ops", "append_dense,store_dense", "--json", str(path))
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["append_dense", "B2-H4-K2-D64-T161-ragged", "ok", "1.0", "KiB"] in lines
    assert [row["wrong"] for row in json.loads(path.read_text())["rows"]] == ["", ""]


def test_bench_kernels_fails_where_one_is_wrong(monkeypatch):
    def broken(*_):
        raise ValueError("out of luck")

    for backend in ("reference", "triton"):
        monkeypatch.setattr(f"kvfx.kernels.dense.{backend}.append", broken)
    result = call(*SMALL, "--ops", "append_dense,store_dense")
    assert result.exit_code == 1
    assert "WRONG: raised ValueError: out of luck" in result.stdout
    assert "store_dense" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_kernels_needs_a_gpu():
    result = call("bench", "kernels")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: there is no GPU here, and kernels cannot be timed")


def test_split():
    assert _split("full, KIVI(bits=4, k_bits=8)|Full(),,a") == [
        "full",
        "KIVI(bits=4, k_bits=8)|Full()",
        "a",
    ]


def test_help_lists_the_commands():
    result = call("--help")
    for command in ("run", "chat", "explain", "policies", "opt", "bench"):
        assert f" {command} " in result.stdout


def test_an_unexpected_error_is_not_hidden(folder, monkeypatch):
    import kvfx

    def fails(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(kvfx, "explain", fails)
    assert not issubclass(ZeroDivisionError, KvfxError)
    with pytest.raises(ZeroDivisionError):
        call("explain", folder)


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "kvfx", "explain", "/nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: '/nowhere' is no file")


def test_plan(folder, tmp_path):
    """What fits, as a table and as JSON; the plan that it writes is compiled by its file."""
    path = tmp_path / "plan.json"
    result = call("plan", folder, "--memory", "64KiB", "--policy", "h2o-20%", "--to", str(path))
    assert result.exit_code == 0
    assert "H2O" in result.stdout
    asked = ("--memory", "64KiB", "--policy", "h2o-20%", "--batch", "2", "--json")
    found = json.loads(call("plan", folder, *asked).stdout)
    assert found["unknown"] == "context"
    assert 0 < found["bytes"] <= 64 * 1024
    model = AutoModelForCausalLM.from_pretrained(folder)
    fast = kvfx.compress(model, plan=path, compile=False, verify=False)
    assert fast.plan.policy == kvfx.policy_named("h2o-20%")


def test_plan_of_too_little_memory(folder):
    result = call("plan", folder, "--memory", "16", "--policy", "full")
    assert result.exit_code != 0
    assert "bytes" in result.output


def test_recommend(folder, tmp_path):
    plan = tmp_path / "plan.json"
    asked = ("recommend", folder, "--memory", "40KiB", "--context", "200", "--tokens", "70")
    result = call(*asked, "--candidates", "kivi-2bit,StreamingLLM(),full", "--to", str(plan))
    assert result.exit_code == 0
    assert result.stdout.startswith("StreamingLLM(budget=")
    assert "not measured: KIVI(bits=2): " in result.stdout
    assert "not measured: Full(): needs" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(folder)
    fast = kvfx.compress(model, plan=plan, compile=False, verify=False)
    assert fast.memory(1, 200) <= 40 * 1024
    document = json.loads(call(*asked, "--candidates", "streaming-25%", "--json").stdout)
    assert document["policy"].startswith("StreamingLLM(")


def test_calibrate(folder, tmp_path):
    out, text = tmp_path / "c.safetensors", tmp_path / "prompts.txt"
    text.write_text("\n\n".join(" ".join(f"w{10 + i % 80}" for i in range(n)) for n in (70, 90)))
    result = call("calibrate", folder, "--out", str(out), "--text", str(text), "--tokens", "64")
    assert result.exit_code == 0
    assert "2 prompts of 64 tokens" in result.stdout
    assert kvfx.Calibration.load(out).prompts == 2
    policy = ("--policy", "XKV(0.25) | SnapKV(window=4)")
    assert "decided by measurements" in call("explain", folder, *policy).output
    result = call("explain", folder, *policy, "--calibration", str(out))
    assert result.exit_code == 0
    assert "SnapKV" in result.stdout
