"""Training with 8-bit matrix products: torchao's float8 recipes on projections of attention and on dense networks.

                                                                     DeepSeek-V3 report 3.3 (mixed precision framework)

    y = s_x s_w (q_x q_w^T),   q = round_e4m3(x / s),   s = max |x| / 448        a scale a tensor, or a row

Dense networks are those of dense layers and the shared experts; the projection that begins an MTP depth is converted
too. Master weights, embedding, head, routers, norms and attention itself keep the run's precision, as in the report.
So do routed experts, whose rows are multiplied group by group in bfloat16; the report's tiles of 1 x 128 are not among
torchao's recipes. Evaluation and text use the plain weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from fathom.errors import DependencyError
from fathom.model.linear import Linear
from fathom.model.transformer import Transformer

Float8Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
MULTIPLE = 16  # both sides of a matrix must be one, for the tensor cores


def train_in_float8(model: Transformer, recipe: Float8Recipe, *, emulate: bool = False) -> int:
    """Let the projections of all layers and MTP depths multiply in float8 where gradients are wanted; how many do.
    emulate: in float32, on any device, with the same roundings. DependencyError: torchao is not installed."""
    parts = [part for block in (*model.layers, *model.mtp) for part in block.modules() if isinstance(part, Linear)]
    fitting = [part for part in parts if not any(size % MULTIPLE for size in part.weight.shape)]
    for part in fitting:
        part.trained_by = _in_float8(part, recipe, emulate)
    return len(fitting)


def _in_float8(part: Linear, recipe: Float8Recipe, emulate: bool) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise DependencyError("hardware.float8 needs torchao; pip install 'fathom-lm[float8]'") from None
    config = Float8LinearConfig.from_recipe_name(recipe)
    # pad_inner_dim: gradients of weights are sums over tokens, of which there is any number. The configuration is
    # frozen, and recipes have no other way.
    for name, value in (("emulate", emulate), ("pad_inner_dim", True)):
        object.__setattr__(config, name, value)
    twin = nn.Linear(part.in_features, part.out_features, bias=False, device="meta")
    narrow = convert_to_float8_training(nn.ModuleDict({"part": twin}), config=config)["part"]

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        if narrow._parameters["weight"] is not weight:  # it is new, or was sharded or replaced since
            narrow._parameters["weight"] = weight
        found: Tensor = narrow(x)
        return found

    return multiply
