"""`calibrate`: what each site of a model can do without, measured on sample prompts; and the file
that carries it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.calibration_prompts import default_prompts
from kvfx.capture import capture, check_decoder
from kvfx.errors import CalibrationError, InputError, UnmatchedAttention
from kvfx.geometry import Site
from kvfx.graph import Graph
from kvfx.pass_manager import run_passes
from kvfx.passes.insert_probes import (
    BITS,
    EVICTION_GRID,
    ROWS,
    STATISTICS,
    STEPS,
    InsertProbes,
    is_probed,
)
from kvfx.passes.pipeline import raise_passes
from kvfx.passes.select_backend import SelectBackend

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# bits of keys and of values, in the order of `quantization_error`
BIT_PAIRS = tuple((k_bits, v_bits) for k_bits in BITS for v_bits in BITS)
# as many rows that ask as there are tokens before them, or more
LEAST_TOKENS = 2 * ROWS
# what a file says that it is; the number changes with the statistics
KIND = "kvfx calibration 1"
# numbers of each parameter that are part of a fingerprint
SAMPLED = 16
# what a configuration says about files, outputs and tokens, not about arithmetic
VOLATILE = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# the sizes of each statistic behind prompts and sites; None: the most KV heads of a site
SHAPES: dict[str, tuple[int | None, ...]] = {
    "retention": (STEPS,),
    "window_retention": (STEPS,),
    "head_retention": (None, STEPS),
    "entropy": (),
    "variance": (),
    "key_entropy": (),
    "eviction_error": (len(EVICTION_GRID),),
    "quantization_error": (len(BIT_PAIRS),),
    "similarity": (),
}


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` measured at the `sites` of a model on P prompts of at most `tokens` tokens.

    The *past* of a prompt are its tokens but the last 32. NaN stands where nothing was measured: at
    sites with a window, beyond the KV heads of a site, where no residual stream was found.

    `retention` [P, L, 128] is the share of all attention that the best g / 128 of the tokens get,
    on average over heads; `window_retention` counts the last 32 rows alone; `head_retention` [P, L,
    K, 128] is that of each KV head. `entropy` and `variance` [P, L] are of what the last rows give
    to the past (CAKE), `key_entropy` of keys (UNComp); `similarity` compares the residual stream
    before and after the attention. The errors of the last rows' output, relative to its length, are
    `eviction_error` [P, L, 6] where the best `EVICTION_GRID` of the past stays at each head, and
    `quantization_error` [P, L, 9] where the past has `BIT_PAIRS` bits.
    """

    model: str
    fingerprint: str
    prompts: int
    tokens: int
    sites: tuple[str, ...]
    retention: Tensor
    window_retention: Tensor
    head_retention: Tensor
    entropy: Tensor
    variance: Tensor
    key_entropy: Tensor
    eviction_error: Tensor
    quantization_error: Tensor
    similarity: Tensor

    def __post_init__(self) -> None:
        for name, sizes in SHAPES.items():
            shape = tuple(self.statistic(name).shape)
            expected = (self.prompts, len(self.sites), *sizes)
            fits = len(shape) == len(expected) and all(
                size in (None, found) for size, found in zip(expected, shape, strict=True)
            )
            if not fits:
                raise CalibrationError(
                    f"the calibration's {name} has shape {list(shape)}, and {self.prompts} prompts "
                    f"and {len(self.sites)} sites need {list(expected)}: calibrate again"
                )

    def statistic(self, name: str) -> Tensor:
        """The statistic called `name`."""
        return getattr(self, name)

    def check(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        """Raise a CalibrationError unless this was measured on `model`, which has these sites."""
        found = fingerprint(model, [site.name for site in sites])
        if found != self.fingerprint:
            raise CalibrationError(
                f"the calibration is of {self.model} (fingerprint {self.fingerprint[:12]}), the "
                f"model is {_described(model)} (fingerprint {found[:12]}): calibrate this model"
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, all of it or nothing."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {name: self.statistic(name).contiguous() for name in STATISTICS}
        facts = {
            "kind": KIND,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "prompts": str(self.prompts),
            "tokens": str(self.tokens),
            "sites": json.dumps(self.sites),
            "versions": json.dumps({name: version(name) for name in ("torch", "transformers")}),
        }
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as partial:
            new = Path(partial, path.name)
            save_file(tensors, new, facts)
            os.replace(new, path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `save` wrote; raises CalibrationError for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                facts = file.metadata() or {}
                if facts.get("kind") != KIND:
                    raise CalibrationError(
                        f"{path} is no calibration of this version of kvfx: it is "
                        f"{facts.get('kind', 'another safetensors file')!r}, not {KIND!r}"
                    )
                tensors = {name: file.get_tensor(name) for name in STATISTICS}
            return cls(
                facts["model"],
                facts["fingerprint"],
                int(facts["prompts"]),
                int(facts["tokens"]),
                tuple(json.loads(facts["sites"])),
                **tensors,
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path} cannot be read as a calibration ({type(error).__name__}: {error}): write "
                "one with kvfx.calibrate(model).save(path)"
            ) from error


def calibrate(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Tensor] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure what each site of `model` can do without, on `prompts`: texts for `tokenizer`, rows
    of token ids [S], or None for built-in texts. Only their first `tokens` tokens are read.

    The captured model runs once per prompt, with ops at each site that reduce its attention to a
    few numbers: weights are never held for more than some rows. `progress(done, prompts)` is called
    after each prompt.

    Raises InputError for prompts that cannot be read, CalibrationError for a model without a site
    that could drop tokens, and what `compress` raises for models that it cannot capture.
    """
    check_decoder(model)
    rows = _rows(model, prompts, tokenizer, tokens)
    graph = _probing(model)
    sites = graph.sites
    probed = [index for index, site in enumerate(sites) if is_probed(site)]
    if not probed:
        raise CalibrationError(
            f"{type(model).__name__} has no site that sees its whole past: there is nothing to "
            f"calibrate ({sites[0].name} sees {sites[0].mask})"
        )
    heads = max(sites[index].kv_heads for index in probed)
    found = {name: _unknown(name, len(rows), len(sites), heads) for name in STATISTICS}
    for done, row in enumerate(rows):
        measured = iter(_measured(graph, row.to(sites[0].device)))
        for index in probed:
            for name in STATISTICS:
                value = next(measured)
                if value is not None:
                    place = tuple(map(slice, value.shape[1:]))
                    found[name][done, index][place] = value[0].cpu()
        if progress is not None:
            progress(done + 1, len(rows))
    names = tuple(site.name for site in sites)
    return Calibration(
        _described(model),
        fingerprint(model, names),
        len(rows),
        max(map(len, rows)),
        names,
        **found,
    )


def fingerprint(model: PreTrainedModel, sites: Sequence[str]) -> str:
    """A hash of the configuration, of a few numbers of every parameter, and of the sites' names."""
    facts = [_lasting(model.config.to_dict()), list(sites)]
    content = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].cpu().contiguous()
        content.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        content.update(bytes(sample.view(torch.uint8).tolist()))
    return content.hexdigest()


def _lasting(facts: object) -> object:
    """A configuration, and those inside it, without what changes from load to load."""
    if not isinstance(facts, dict):
        return facts
    return {str(key): _lasting(value) for key, value in facts.items() if key not in VOLATILE}


def _described(model: PreTrainedModel) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__} with {parameters:,} parameters"


def _rows(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Tensor] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: int,
) -> list[Tensor]:
    """The first `tokens` token ids of each prompt."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise InputError(f"calibrate(tokens={tokens}): the model reads {limit} tokens at most")
    if tokens < LEAST_TOKENS:
        raise InputError(
            f"calibrate(tokens={tokens}): {LEAST_TOKENS} or more are needed, since the last {ROWS} "
            "tokens of a prompt are asked what they make of those before"
        )
    texts = default_prompts() if prompts is None else prompts
    if not texts:
        raise InputError("calibrate(prompts=[]): give at least one, or None for built-in ones")
    rows = [_token_ids(prompt, tokenizer)[:tokens] for prompt in texts]
    least = LEAST_TOKENS if prompts is not None else tokens
    for index, row in enumerate(rows):
        if len(row) < least:
            raise InputError(
                f"prompt {index} has {len(row)} tokens: {least} are needed to calibrate"
            )
    return rows


def _token_ids(prompt: str | Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.dtype != torch.int64:
            raise InputError(
                f"a prompt of shape {list(prompt.shape)} and dtype {prompt.dtype} is no row of "
                "int64 token ids [S]"
            )
        return prompt
    if tokenizer is None:
        raise InputError("prompts are texts: calibrate needs tokenizer=, or rows of token ids")
    # texts may be longer than what the model reads: tokenizers would warn about that
    return torch.tensor(tokenizer(prompt, verbose=False)["input_ids"], dtype=torch.int64)


def _probing(model: PreTrainedModel) -> Graph:
    """The model as a graph that measures its attention."""
    graph = run_passes(capture(model), raise_passes(), None)
    lost = set(graph.missed) - {site.name for site in graph.sites}
    if lost:
        reasons = "\n".join(f"  {graph.missed[name]}" for name in sorted(lost))
        raise UnmatchedAttention(
            f"{len(lost)} attention sites of {type(model).__name__} are not understood:\n{reasons}"
            "\nno cache can serve them; kvfx.explain(model, policy) shows what was found"
        )
    return run_passes(graph, (InsertProbes(), SelectBackend("reference")), None)


@torch.no_grad()
def _measured(graph: Graph, row: Tensor) -> tuple[Tensor | None, ...]:
    """What the probes report about a prompt [S]."""
    index = torch.arange(len(row), device=row.device)
    return graph.module(row[None], index[None], index[-1:])[1:]


def _unknown(name: str, prompts: int, sites: int, heads: int) -> Tensor:
    """NaN in the shape of a statistic."""
    sizes = [heads if size is None else size for size in SHAPES[name]]
    dtype = torch.float64 if name.endswith("retention") else torch.float32
    return torch.full((prompts, sites, *sizes), float("nan"), dtype=dtype)
