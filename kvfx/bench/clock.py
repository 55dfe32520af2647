"""When `generate` delivers each token."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# the sampling knobs of a model's own generation config would only raise warnings
GREEDY: dict[str, object] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


class Clock:
    """A streamer for `generate` that notes the time of every token, and hands it on to `then`."""

    def __init__(self, then: Callable[[Tensor], None] | None = None) -> None:
        self.then = then
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token [B] after the other."""
        if value.is_cuda:
            torch.cuda.synchronize(value.device)
        self.times.append(time.perf_counter())
        if self.then is not None:
            self.then(value)

    def end(self) -> None:
        """Nothing is held back."""

    @property
    def first(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def steps(self) -> list[float]:
        """Seconds of each further token."""
        return [
            after - before for before, after in zip(self.times[1:-1], self.times[2:], strict=True)
        ]


def generate_clocked(
    model: Any,
    ids: Tensor,
    tokens: int,
    options: Mapping[str, object],
    then: Callable[[Tensor], None] | None,
) -> tuple[Any, Clock]:
    """What `model.generate` gives for `ids` [B, S], none of them padding, and when tokens came."""
    clock = Clock(then)
    with torch.no_grad():
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            streamer=clock,
            **options,
        )
    return result, clock
