"""A HuggingFace decoder as one stateless graph; the only file of the compiler that knows
transformers' insides.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvfx.errors import CaptureError
from kvfx.graph import Graph, Level

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECURRENT = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "ssm", "lightning", "rwkv")


class _Stateless(nn.Module):
    """`f(input_ids [B, S], position_ids [B, S], logits_index [L]) -> logits [B, L, V]` of a
    decoder. One that counts positions itself does not look at `position_ids`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.selects_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.takes_positions = takes_positions(model)

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_index: Tensor) -> Tensor:
        options: dict[str, object] = {"input_ids": input_ids, "use_cache": False}
        if self.takes_positions:
            options["position_ids"] = position_ids
        if self.selects_logits:
            return self.model(**options, logits_to_keep=logits_index).logits
        return self.model(**options).logits[:, logits_index]


def takes_positions(model: nn.Module) -> bool:
    """Whether a model is told positions; one that is not counts them itself."""
    return "position_ids" in inspect.signature(model.forward).parameters


# what was captured, for as long as the model lives, and what the model was like then
_CAPTURED: WeakKeyDictionary[nn.Module, tuple[object, Graph]] = WeakKeyDictionary()


def capture(model: PreTrainedModel) -> Graph:
    """Capture the forward pass of `model` with dynamic batch and length; weights are shared,
    `model` is unchanged. A model that was captured before, and is as it was, is not traced again.

    Raises CaptureError for anything that is not a decoder with attention: encoders,
    encoder-decoders, recurrent layers, models without a language-model head, weights on several
    devices.
    """
    return held_capture(model).copy()


def held_capture(model: PreTrainedModel) -> Graph:
    """What `capture` copies: the same graph, never to be changed, for as long as the model is as it
    was.
    """
    check_decoder(model)
    likeness = _likeness(model)
    known = _CAPTURED.get(model)
    if known is None or known[0] != likeness:
        # a copy has plain inputs and outputs: the calling convention of export stays behind
        _CAPTURED[model] = known = (likeness, _trace(model).copy())
    return known[1]


def _likeness(model: PreTrainedModel) -> object:
    """What the trace of a model depends on: its configuration, its modules, what was put over
    their code, and its tensors (their values may change: the trace shares them).
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    modules = [
        (type(module), module.__dict__.get("forward"), *map(len, _hooks(module)))
        for module in model.modules()
    ]
    held = [(name, id(x), x.shape, x.dtype, x.device) for name, x in tensors]
    return model.config.to_json_string(use_diff=False), modules, held


def _hooks(module: nn.Module) -> tuple[Mapping[int, object], Mapping[int, object]]:
    """What runs before and after the code of a module."""
    return module._forward_pre_hooks, module._forward_hooks


def _trace(model: PreTrainedModel) -> Graph:
    device = next(model.parameters()).device
    input_ids = torch.zeros(2, 7, dtype=torch.int64, device=device)
    position_ids = torch.arange(7, device=device).expand(2, 7).contiguous()
    logits_index = torch.tensor([2, 5, 6], device=device)
    with _as_sdpa_in_eval(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = _export(model, (input_ids, position_ids, logits_index))
        module = exported.module()
    _share_weights(module, model)
    return Graph(module, Level.CAPTURED, windows=_config_windows(model))


def _export(model: PreTrainedModel, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """The exported forward pass, for any batch and length; some models bound their length, by a
    table of positions say, and export then finds the bound itself.
    """
    any_size = tuple(torch.export.Dim(name, min=1) for name in ("batch", "length", "kept"))
    for sizes in (any_size, (torch.export.Dim.AUTO,) * 3):
        batch, length, kept = sizes
        shapes = {
            "input_ids": {0: batch, 1: length},
            "position_ids": {0: batch, 1: length},
            "logits_index": {0: kept},
        }
        try:
            exported = torch.export.export(
                _Stateless(model), inputs, dynamic_shapes=shapes, strict=False
            )
        except Exception as error:
            if "Constraints violated" in str(error) and sizes is any_size:
                continue
            raise CaptureError(
                f"{type(model).__name__} cannot be captured by torch.export: {_reason(error)}"
            ) from error
        _check_sizes(model, exported)
        return exported
    raise AssertionError


def _check_sizes(model: PreTrainedModel, exported: torch.export.ExportedProgram) -> None:
    """Raise a CaptureError unless the graph holds for any batch and length."""
    names = exported.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.name in names}
    fixed = [
        what
        for what, size in zip(("batch", "length"), values["input_ids"].shape, strict=True)
        if not isinstance(size, torch.SymInt)
    ]
    if fixed:
        raise CaptureError(
            f"{type(model).__name__} computes something else for every {' and '.join(fixed)}: its "
            "graph holds for one only"
        )


def check_decoder(model: PreTrainedModel) -> None:
    """Raise a CaptureError unless `model` looks like a decoder that transformers can generate
    with.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise CaptureError(
            f"{kind} is not a transformers model: load one with AutoModelForCausalLM"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(f"{kind} is an encoder-decoder: kvfx compresses decoder-only models")
    if model.get_output_embeddings() is None:
        raise CaptureError(f"{kind} has no language-model head: load it with AutoModelForCausalLM")
    if not model.can_generate():
        raise CaptureError(
            f"{kind} is not a decoder (it cannot generate): load it with AutoModelForCausalLM"
        )
    _check_layers(model)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise CaptureError(
            f"{kind} has weights on {', '.join(devices)}: put the whole model on one device"
        )


def _check_layers(model: PreTrainedModel) -> None:
    """Raise a CaptureError for layers that carry a state instead of keys and values."""
    kind, config = type(model).__name__, model.config.get_text_config()
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(getattr(config, "layer_types", None) or ()):
        if any(word in layer for word in RECURRENT):
            found.setdefault(layer, []).append(index)
    if found:
        listed = "; ".join(
            f"{layer} in {'layers' if len(at) > 1 else 'layer'} {', '.join(map(str, at))}"
            for layer, at in found.items()
        )
        raise CaptureError(
            f"{kind} has recurrent layers ({listed}): their state is no KV cache, kvfx cannot "
            "carry it"
        )
    if getattr(model, "_is_stateful", False):
        raise CaptureError(
            f"{kind} carries a state of its own from token to token beside keys and values: kvfx "
            "cannot carry it"
        )


@contextlib.contextmanager
def _as_sdpa_in_eval(model: PreTrainedModel) -> Iterator[None]:
    """Attention through SDPA and no dropout while the body runs; afterwards the model is as it
    was.
    """
    implementation = model.config._attn_implementation
    training = [(module, module.training) for module in model.modules()]
    try:
        if model._can_set_attn_implementation():
            with contextlib.suppress(ValueError, ImportError):
                model.set_attn_implementation("sdpa")
        model.eval()
        yield
    finally:
        if implementation is not None and model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)
        for module, flag in training:
            module.training = flag


def _share_weights(module: nn.Module, model: nn.Module) -> None:
    """Assert that no weight was copied: every tensor of the capture lives in the storage of the
    model's.
    """
    owned = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    copied = [
        name for name, parameter in module.named_parameters() if parameter.data_ptr() not in owned
    ]
    assert not copied, f"capture copied weights: {copied}"


def _config_windows(model: PreTrainedModel) -> tuple[int, ...]:
    """Every window or chunk length that the config names: masks are probed beyond all of them."""
    config = model.config.get_text_config()
    names = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
    return tuple(
        value
        for name in names
        if isinstance(value := getattr(config, name, None), int) and value > 0
    )


def _reason(error: Exception) -> str:
    """What an error of torch.export says, on one line."""
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "its code branches on the values of tensors, a graph cannot"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
