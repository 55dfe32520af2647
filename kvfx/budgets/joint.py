"""Auto: tokens and bits of every layer in one search, for the least error within so many bytes."""

from __future__ import annotations

from torch import Tensor

from kvfx.budgets.knapsack import cheapest_errors

# the parts of tokens whose eviction errors a calibration holds, in their order
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
# of the bytes that a choice may add to the cheapest one: one part in so many may stay unused by
# the search, and is spent afterwards
CELLS = 1 << 14


def joint_errors(eviction_error: Tensor, quantization_error: Tensor) -> Tensor:
    """The squared error of every fraction of tokens with every pair of bits, [L, E, Q], as the mean
    over prompts: eviction_error [P, L, E] and quantization_error [P, L, Q] count as independent.
    """
    eviction, quantization = (
        (error.double() ** 2).mean(0) for error in (eviction_error, quantization_error)
    )
    return eviction[:, :, None] + quantization[:, None]


def joint_choice(errors: Tensor, sizes: Tensor, limit: int) -> tuple[tuple[int, int], ...]:
    """The (fraction, pair) of every layer, as indices into errors [L, E, Q], for which errors
    sum to the least and sizes (bytes, [L, E, Q] int64) to at most `limit`.
    """
    pairs = errors.shape[2]
    chosen = cheapest_errors(errors.flatten(1), sizes.flatten(1), limit, CELLS)
    return tuple(divmod(option, pairs) for option in chosen)
