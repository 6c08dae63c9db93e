"""The attentions there are. A new one is a file beside this one and a line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from fathom.model.attention.gqa import GQA, GQAConfig
from fathom.model.attention.mla import MLA, MLAConfig

AttentionConfig = Annotated[GQAConfig | MLAConfig, Field(discriminator="kind")]


def build_attention(config: GQAConfig | MLAConfig, hidden_size: int) -> nn.Module:
    """The module that a configuration describes."""
    return MLA(config, hidden_size) if isinstance(config, MLAConfig) else GQA(config, hidden_size)
