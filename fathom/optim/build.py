"""Configuration -> optimizer. One object whatever the kind: it steps, takes a factor of its learning rate, and gives
its state by the names of the weights, so that a checkpoint does not depend on the order of parameters or groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fathom.errors import CheckpointError
from fathom.knobs import Knobs, Many
from fathom.optim.groups import split
from fathom.optim.muon import Muon


def _betas() -> Any:
    return Field(default=(0.9, 0.95), min_length=2, max_length=2)


class AdamWConfig(Knobs):
    """AdamW (Loshchilov & Hutter 2019; 1711.05101), PyTorch's fused kernel, float32 weights and moments."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    """The learning rate that the scheduler's factor multiplies."""
    betas: Many[Annotated[float, Field(ge=0, lt=1)]] = _betas()
    """Decay of the two moments."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of matrices, embedding and head; norms and biases are not decayed."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""


class MuonConfig(Knobs):
    """Muon for matrices, AdamW for embedding, head, norms and biases (DeepSeek-V4 report 2.4)."""

    kind: Literal["muon"]
    lr: float = Field(default=1e-3, gt=0)
    """The learning rate of Muon and, unless adamw_lr is given, of AdamW."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """mu."""
    weight_decay: float = Field(default=0.1, ge=0)
    """lambda, of matrices, embedding and head."""
    update_rms: float = Field(default=0.18, gt=0)
    """gamma: RMS of an update before the learning rate; AdamW's is about 0.2, so its learning rates carry over."""
    router: Literal["muon", "adamw"] = "muon"
    """Which of the two moves the router's matrix; DeepSeek-V4 uses Muon."""
    newton_schulz: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the orthogonalization; auto: bfloat16 where the run's matrix products are, else float32."""
    newton_schulz_steps: int = Field(default=10, ge=1)
    """Steps of the orthogonalization; a fifth of them, the last, converge. DeepSeek-V4: 10; the first Muon: 5."""
    adamw_lr: float | None = Field(default=None, gt=0)
    """Learning rate of AdamW's part; null: lr."""
    adamw_betas: Many[Annotated[float, Field(ge=0, lt=1)]] = _betas()
    """Decay of AdamW's moments."""
    adamw_eps: float = Field(default=1e-20, gt=0)
    """AdamW's eps (DeepSeek-V4: 1e-20)."""


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


class Optimizer:
    """One or two torch optimizers as one. parts: they; names: name -> weight, for all weights that they move."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer], names: Mapping[str, Tensor]) -> None:
        self.parts = list(parts)
        self.names = dict(names)
        for group in self._groups():
            group["peak_lr"] = group["lr"]
        self.lr = max(group["peak_lr"] for group in self._groups())

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def weights(self) -> list[Tensor]:
        """Every weight that is moved, in the order of names."""
        return list(self.names.values())

    def set_factor(self, factor: float) -> None:
        """Learning rates become factor x what the configuration said."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        """One update from the gradients that are there."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat: "<what>/<weight's name>" -> tensor. Weights that were never updated have none."""
        of = {weight: name for name, weight in self.names.items()}
        return {
            f"{what}/{of[weight]}": value
            for part in self.parts
            for weight, states in part.state.items()
            for what, value in states.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse. Raises CheckpointError where the state is another optimizer's or another model's."""
        owner = {id(w): part for part in self.parts for group in part.param_groups for w in group["params"]}
        wanted = {id(w): _STATES[type(owner[id(w)])] for w in self.names.values()}
        for part in self.parts:
            part.state.clear()
        for key, value in state.items():
            what, name = key.split("/", 1)
            weight = self.names.get(name)
            if weight is None or what not in wanted[id(weight)] or (what != "step" and value.shape != weight.shape):
                raise CheckpointError(
                    f"the checkpoint's optimizer state has {key} {tuple(value.shape)}, which this run's optimizer "
                    f"does not know; "
                    "resume with the optimizer and model that the run began with"
                )
            owner[id(weight)].state[weight][what] = value.to(weight.device, copy=True)


_STATES: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum_buffer",),
}


def build_optimizer(model: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> Optimizer:
    """The optimizer of a model. dtype: of the run's matrix products, for `newton_schulz: auto`."""
    groups = split(model)
    names = {**groups.matrices, **groups.routers, **groups.tables, **groups.vectors}
    if isinstance(config, AdamWConfig):
        decayed = [*groups.matrices.values(), *groups.routers.values(), *groups.tables.values()]
        adamw = _adamw(decayed, groups.vectors.values(), config.lr, config.betas, config.eps, config.weight_decay)
        return Optimizer([adamw], names)
    by_muon = list(groups.matrices.values())
    decayed = list(groups.tables.values())
    (by_muon if config.router == "muon" else decayed).extend(groups.routers.values())
    parts: list[torch.optim.Optimizer] = []
    if by_muon:
        arithmetic = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
            config.newton_schulz, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        )
        steps = config.newton_schulz_steps
        parts.append(
            Muon(by_muon, config.lr, config.momentum, config.weight_decay, config.update_rms, arithmetic, steps)
        )
    if decayed or groups.vectors:
        lr = config.adamw_lr or config.lr
        betas, eps = config.adamw_betas, config.adamw_eps
        parts.append(_adamw(decayed, groups.vectors.values(), lr, betas, eps, config.weight_decay))
    return Optimizer(parts, names)


def _adamw(
    decayed: Iterable[Tensor], plain: Iterable[Tensor], lr: float, betas: tuple[float, ...], eps: float, decay: float
) -> torch.optim.AdamW:
    groups = [{"params": list(decayed), "weight_decay": decay}, {"params": list(plain), "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
