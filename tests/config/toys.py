"""Small configuration classes with one of everything, so that the tests of config/ need no other room."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fathom.knobs import Knobs, Many


class Gqa(Knobs):
    kind: Literal["gqa"] = "gqa"
    num_attention_heads: int = Field(default=8, gt=0)
    num_key_value_heads: int = Field(default=2, gt=0)

    @model_validator(mode="after")
    def _divide(self) -> Gqa:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads is {self.num_key_value_heads}, which does not divide the heads")
        return self


class Mla(Knobs):
    kind: Literal["mla"]
    num_attention_heads: int = Field(gt=0)
    kv_lora_rank: int = Field(gt=0)
    """C: width of the latent."""
    q_lora_rank: int | None = None


class Experts(Knobs):
    layers: Many[int] | None = None
    n_routed_experts: int = 4


class Model(Knobs):
    hidden_size: int = Field(default=512, gt=0)
    hidden_act: Literal["silu"] = "silu"
    eps: float = Field(default=1e-6, gt=0)
    attention: Annotated[Gqa | Mla, Field(discriminator="kind")] = Gqa(num_key_value_heads=4)
    moe: Experts | None = None


class Hub(Knobs):
    kind: Literal["hub"]
    path: str
    weight: float = Field(default=1.0, gt=0)


class Text(Knobs):
    kind: Literal["text"]
    path: Path
    documents: Literal["file", "line"] = "file"


class Data(Knobs):
    datasets: Many[Annotated[Hub | Text, Field(discriminator="kind")]] = Field(default=(), min_length=1)
    fraction: float = Field(default=0.05, ge=0, lt=1)


class Training(Knobs):
    output_dir: Path = Path("runs/toy")
    max_steps: int = Field(default=10, gt=0)
    sequence_length: int = 128
    prompts: Many[str] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    threads: int | Literal["auto"] = "auto"
    compile: bool = False
    lr: float = 1e-3
    named: dict[str, int] = Field(default_factory=dict)


class Toy(Knobs):
    model: Model = Model()
    data: Data
    training: Training = Training()

    @model_validator(mode="after")
    def _fit(self) -> Toy:
        if self.training.sequence_length > self.model.hidden_size:
            raise ValueError(
                f"training.sequence_length is {self.training.sequence_length}, more than model.hidden_size"
            )
        return self


SYNONYMS = {"learning_rate": "training.lr", "d_model": "model.hidden_size"}
