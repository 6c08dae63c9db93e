"""Activation recomputation: a block keeps its inputs alone and runs again in the backward pass (Chen et al. 2016;
1604.06174).

About a third more arithmetic, and memory of one block's activations instead of all of them. Blocks return their
routing statistics, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(block, *arguments)` -> the same, recomputing. For `Transformer.run_block`:

    model.run_block = recomputed(model.run_block)
    """

    def run_again(block: Any, *arguments: Any) -> Any:
        if not block.training:
            return run(block, *arguments)
        return checkpoint(run, block, *arguments, use_reentrant=False, preserve_rng_state=False)

    return run_again
