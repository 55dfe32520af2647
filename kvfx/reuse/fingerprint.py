"""What keys and values depend on besides tokens: models with one fingerprint compute the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx import calibration
from kvfx.errors import InputError
from kvfx.geometry import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# what a tokenizer's file says about its last call
CALL_STATE = ("padding", "truncation")
NOTHING = "none"


@dataclass(frozen=True)
class Fingerprint:
    """Hex hashes of the `weights` (with the configuration), of the `tokenizer`, of its chat
    `template`, and of the `rope` and shapes of every site; and the `dtype` of the model.

    `"none"` stands for a tokenizer or a template that there is not, and for no sites.
    """

    weights: str
    tokenizer: str
    template: str
    rope: str
    dtype: str

    @property
    def digest(self) -> str:
        """One hex hash of them all."""
        return _hash(asdict(self))


def fingerprint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sites: Sequence[Site] = (),
) -> Fingerprint:
    """The fingerprint of `model`, of the tokenizer that gives it tokens, and of its sites.

    Every byte of every weight is hashed, some seconds per GB. Raises InputError for weights that
    are not loaded.
    """
    return Fingerprint(
        weights=_weights(model, sites),
        tokenizer=NOTHING if tokenizer is None else _tokenizer(tokenizer),
        template=NOTHING if tokenizer is None else _template(tokenizer),
        rope=_hash([_site_facts(site) for site in sites]) if sites else NOTHING,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _weights(model: PreTrainedModel, sites: Sequence[Site]) -> str:
    """The configuration, the sites' names, and every parameter and saved buffer."""
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    tensors = [*model.named_parameters(), *buffers]
    for name, tensor in tensors:
        if tensor.is_meta:
            raise InputError(f"fingerprint(): {name} is on the meta device: load the weights first")
    names = [site.name for site in sites]
    content = hashlib.sha256(calibration.fingerprint(model, names).encode())
    for name, tensor in tensors:
        content.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        content.update(tensor_bytes(tensor))
    return content.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any shape and dtype, row by row, in the main memory."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts: dict[str, object] = {
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "vocabulary": sorted(tokenizer.get_vocab().items()),
    }
    if backend is None:
        return _hash({**facts, "class": type(tokenizer).__name__})
    rules = json.loads(backend.to_str())
    return _hash({**facts, **{name: rules[name] for name in rules if name not in CALL_STATE}})


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return NOTHING if template is None else _hash(template)


def _site_facts(site: Site) -> list[object]:
    """How a site rotates its keys, whom it sees, and the shapes of its keys and values."""
    rope = site.rope
    turns = None if rope is None else [rope.style, *(f.hex() for f in map(float, rope.frequencies))]
    return [turns, str(site.mask), site.kv_heads, site.head_dim, site.value_dim, str(site.dtype)]


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
