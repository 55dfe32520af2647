"""A decoder of your own, with attention written by hand, compresses like any other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import kvfx


class TinyConfig(PreTrainedConfig):
    """Sizes of the decoder; `cap` bounds its scores."""

    model_type = "tiny-by-hand"

    def __init__(
        self, vocab_size=256, hidden_size=128, layers=4, heads=4, kv_heads=2, cap=20.0, **rest
    ):
        super().__init__(**rest)
        self.vocab_size, self.hidden_size, self.cap = vocab_size, hidden_size, cap
        self.num_hidden_layers, self.heads, self.kv_heads = layers, heads, kv_heads


class Angles(NamedTuple):
    """Cosines and sines of positions [B, 1, S, D / 2]."""

    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """Rotate channels i and i + D / 2 of x [B, H, S, D]."""
        first, second = x.chunk(2, -1)
        return torch.cat(
            (first * self.cos - second * self.sin, second * self.cos + first * self.sin), -1
        )


class Attention(nn.Module):
    """Grouped queries, rotation, capped scores: nothing but matmul, tanh and softmax."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.cap = config.heads, config.kv_heads, config.cap
        self.width = config.hidden_size // config.heads
        self.q = nn.Linear(config.hidden_size, config.heads * self.width, bias=False)
        self.kv = nn.Linear(config.hidden_size, 2 * config.kv_heads * self.width, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angles: Angles, hidden: Tensor) -> Tensor:
        """What rows x [B, S, E] take from the rows that are not `hidden` [S, S] from them."""
        batch, rows, _ = x.shape
        q = self.q(x).view(batch, rows, self.heads, self.width).transpose(1, 2)
        k, v = (
            self.kv(x).view(batch, rows, 2 * self.kv_heads, self.width).transpose(1, 2).chunk(2, 1)
        )
        k = angles.turn(k).repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        scores = angles.turn(q) @ k.transpose(-1, -2) / math.sqrt(self.width)
        scores = self.cap * torch.tanh(scores / self.cap)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, rows, -1))


class TinyByHand(PreTrainedModel, GenerationMixin):
    """Embedding, layers of attention and a feed-forward block, a head. It knows no cache at all."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        size, width = config.hidden_size, config.hidden_size // config.heads
        self.embed = nn.Embedding(config.vocab_size, size)
        self.attend = nn.ModuleList(Attention(config) for _ in range(config.num_hidden_layers))
        self.think = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size)
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, config.vocab_size, bias=False)
        turns = 10_000.0 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("turns", turns)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """What makes it a language model."""
        return self.head

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False, **_
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] of tokens [B, S]."""
        rows = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(rows, device=input_ids.device)[None]
        phase = position_ids[:, None, :, None] * self.turns
        angles = Angles(phase.cos(), phase.sin())
        place = torch.arange(rows, device=input_ids.device)
        hidden = place[:, None] < place
        x = self.embed(input_ids)
        for attend, think in zip(self.attend, self.think, strict=True):
            x = x + attend(self.norm(x), angles, hidden)
            x = x + think(x)
        return CausalLMOutputWithPast(logits=self.head(self.norm(x)))


def main() -> None:
    """Compress it, and say the same with and without; print what kvfx found out about it."""
    torch.manual_seed(0)
    model = TinyByHand(TinyConfig()).eval()
    prompt = torch.randint(1, 256, (1, 200))
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, use_cache=False, **options)
    fast = kvfx.compress(model, kvfx.Full(), compile=False)
    same = torch.equal(fast.generate(prompt, **options), expected)
    print(fast.report)
    print(f"the same {options['max_new_tokens']} tokens as without a cache: {same}\n")
    small = kvfx.compress(
        model, kvfx.SnapKV(budget=64, window=16) | kvfx.KIVI(bits=4), compile=False
    )
    small.generate(prompt, **options)
    held = [x.memory(batch=1, length=4096) for x in (small, fast)]
    print(f"SnapKV | KIVI: {held[0]:,} bytes for a prompt of 4,096 tokens, instead of {held[1]:,}")


if __name__ == "__main__":
    main()
