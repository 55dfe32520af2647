"""What kvfx makes of an architecture: proven site by site, or refused with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import kvfx
from kvfx.capture import takes_positions
from kvfx.errors import KvfxError
from kvfx.reuse.fingerprint import fingerprint
from kvfx.testing.architectures import UNBUILT, class_name, tiny_architecture
from kvfx.testing.tiny import left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfx.model import CompressedModel

# prompts of one batch: one is longer than three windows of the tiny models, all are padded but it
LENGTHS = (53, 19, 37)
# rows that are read after the prompt: several at once, then one by one
PIECES = (6, 1, 1, 5, 1)
SHIFT = 9
POLICIES = {
    "KIVI(4)": kvfx.KIVI(bits=4, residual=0),
    "SnapKV": kvfx.SnapKV(budget=12, window=4),
}


@dataclass(frozen=True)
class Finding:
    """One architecture: its sites and how they compute, or why it is refused."""

    model_type: str
    kind: str
    refused: str = ""
    sites: int = 0
    roots: str = ""
    masks: str = ""
    rope: str = ""
    rules: str = ""
    heads: str = ""
    entry: str = ""
    cut: str = ""
    policies: str = ""


def examine(model_type: str) -> Finding:
    """Compress a tiny model under `Full()`, KIVI, SnapKV, and CacheLatent where K and V come from
    something narrower, and compare it with itself.

    Raises AssertionError where kvfx computes something else, or changes the model.
    """
    if model_type in UNBUILT:
        return Finding(model_type, class_name(model_type), UNBUILT[model_type])
    model = tiny_architecture(model_type)
    kind, before = type(model).__name__, fingerprint(model).digest
    try:
        full = kvfx.compress(model, kvfx.Full(), compile=False)
    except KvfxError as error:
        assert fingerprint(model).digest == before, "a refused model was changed"
        return Finding(model_type, kind, reason_of(error))
    compare(model, full)
    run = []
    for name, policy in POLICIES.items():
        try:
            fast = kvfx.compress(model, policy, compile=False, verify=False, strict=False)
        except KvfxError as error:
            run.append(f"no {name}: {reason_of(error)}")
            continue
        notes = [site.note for site in fast.report.sites if site.note.startswith("dense")]
        assert bool(torch.isfinite(through(fast, *prompts(), shift=0)).all()), name
        run.append(f"no {name}: {notes[0]}" if notes else name)
    if any(site.site.latent for site in full.plan.sites):
        latent = kvfx.CacheLatent()
        fast = kvfx.compress(model, latent, compile=False, verify=False, strict=False)
        # exact up to rounding, as `Full()` is
        compare(model, fast)
        run.append("CacheLatent")
    assert fingerprint(model).digest == before, "the model was changed"
    return described(model_type, kind, full, run)


def described(model_type: str, kind: str, full: CompressedModel, run: list[str]) -> Finding:
    """What the programs of a model say about its attention."""
    sites = [site.site for site in full.plan.sites]
    rules = {"softcap": "softcap", "slopes": "ALiBi", "sinks": "sinks"}
    bits = sites[0].dtype.itemsize
    cut = (sum(site.latent) * bits for site in sites if site.latent)
    wide = sorted({site.width * bits for site in sites})
    raised = full.trail["match-attention"].statistics.hits
    return Finding(
        model_type,
        kind,
        sites=len(sites),
        roots=_listed(raised),
        masks=_listed(str(site.mask) for site in sites),
        rope=_listed(str(site.rope) if site.rope else "none" for site in sites),
        rules=_listed(word for name, word in rules.items() if getattr(sites[0], name)),
        heads=_listed(f"{x.heads}/{x.kv_heads} of {x.head_dim}" for x in sites),
        entry=_listed(map(str, wide)),
        cut=_listed(map(str, cut)),
        policies=_listed(("Full", *run)),
    )


def _listed(words: Any) -> str:
    return ", ".join(dict.fromkeys(words))


def reason_of(error: KvfxError) -> str:
    """The reason of a refusal, of its first site where there are several, on one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    first = lines[1] if len(lines) > 1 and lines[0].endswith("not understood:") else lines[0]
    return first.split(" (verify=False")[0]


def prompts() -> tuple[Tensor, Tensor]:
    """Padded prompts [3, S] and their mask, and behind them what is read later, [3, S + more]."""
    batch = left_padded([length + sum(PIECES) for length in LENGTHS])
    return batch["input_ids"], batch["attention_mask"]


def compare(model: PreTrainedModel, full: CompressedModel) -> None:
    """Assert that what comes out of a cache, for padded rows read in pieces, is what the model
    says to each row at once; at shifted positions too, where it takes positions and counts no
    chunks from its first token.
    """
    ids, mask = prompts()
    shifts = takes_positions(model) and not full.plan.chunked
    for shift in (0, SHIFT) if shifts else (0,):
        found = through(full, ids, mask, shift)
        for row in range(len(LENGTHS)):
            real = mask[row].bool()
            alone = ids[row, real][None]
            options: dict[str, Any] = {"use_cache": False}
            if takes_positions(model):
                options["position_ids"] = torch.arange(alone.shape[1])[None] + shift
            with torch.no_grad():
                expected = model(input_ids=alone, **options).logits[0]
            bound = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
            error = float((found[row, real] - expected).abs().max())
            assert error <= bound, f"row {row}, positions + {shift}: off by {error:.3g}"


def through(fast: CompressedModel, ids: Tensor, mask: Tensor, shift: int) -> Tensor:
    """Logits [3, S, V] of tokens that are read in pieces."""
    cache, out, start = None, [], 0
    positions = (mask.cumsum(1) - 1 + shift).clamp(min=0)
    for rows in (ids.shape[1] - sum(PIECES), *PIECES):
        here = slice(start, start + rows)
        options = {"position_ids": positions[:, here]} if shift else {}
        read = fast(
            input_ids=ids[:, here],
            attention_mask=mask[:, : start + rows],
            past_key_values=cache,
            **options,
        )
        cache, start = read.past_key_values, start + rows
        out.append(read.logits)
    return torch.cat(out, 1)
