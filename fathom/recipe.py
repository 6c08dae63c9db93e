"""RunConfig: the whole YAML tree. It gathers the branches; no part is ever handed more than its own."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from fathom.config.file import Overrides, read
from fathom.config.parse import parse
from fathom.data.loader import DataConfig
from fathom.knobs import Knobs
from fathom.model.transformer import ModelConfig
from fathom.optim.build import AdamWConfig, OptimizerConfig
from fathom.optim.schedule import OneCycleConfig, SchedulerConfig
from fathom.runtime.device import HardwareConfig
from fathom.tokenizer.train import BPE, GPT2, TokenizerConfig
from fathom.train.metrics import LoggingConfig
from fathom.train.trainer import TrainingConfig

SYNONYMS = {  # what other kits call it -> what it is called here; for the hints of error messages
    "n_embd": "model.hidden_size",
    "d_model": "model.hidden_size",
    "dim": "model.hidden_size",
    "embed_dim": "model.hidden_size",
    "n_layer": "model.num_hidden_layers",
    "n_layers": "model.num_hidden_layers",
    "num_layers": "model.num_hidden_layers",
    "n_head": "model.attention.num_attention_heads",
    "n_heads": "model.attention.num_attention_heads",
    "num_heads": "model.attention.num_attention_heads",
    "n_kv_heads": "model.attention.num_key_value_heads",
    "num_kv_heads": "model.attention.num_key_value_heads",
    "ffn_dim": "model.intermediate_size",
    "d_ff": "model.intermediate_size",
    "block_size": "model.max_position_embeddings",
    "context_length": "model.max_position_embeddings",
    "max_seq_len": "model.max_position_embeddings",
    "tie_embeddings": "model.tie_word_embeddings",
    "num_experts": "model.moe.n_routed_experts",
    "n_experts": "model.moe.n_routed_experts",
    "num_local_experts": "model.moe.n_routed_experts",
    "num_shared_experts": "model.moe.n_shared_experts",
    "top_k_experts": "model.moe.num_experts_per_tok",
    "expert_capacity": "model.moe.capacity_factor",
    "moe_layers": "model.moe.layers",
    "learning_rate": "optimizer.lr",
    "adam_epsilon": "optimizer.eps",
    "lr_scheduler": "scheduler.kind",
    "lr_scheduler_type": "scheduler.kind",
    "steps": "training.max_steps",
    "max_iters": "training.max_steps",
    "num_steps": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "accumulate_grad_batches": "training.gradient_accumulation_steps",
    "grad_accum_steps": "training.gradient_accumulation_steps",
    "seq_len": "training.sequence_length",
    "max_length": "training.sequence_length",
    "log_interval": "training.logging_steps",
    "log_every": "training.logging_steps",
    "save_interval": "training.save_steps",
    "checkpoint_interval": "training.save_steps",
    "eval_interval": "training.eval_steps",
    "out_dir": "training.output_dir",
    "random_seed": "training.seed",
    "grad_clip": "hardware.gradient_clip",
    "clip_grad": "hardware.gradient_clip",
    "max_grad_norm": "hardware.gradient_clip",
    "gradient_clip_val": "hardware.gradient_clip",
    "gradient_checkpointing": "hardware.recompute",
    "activation_checkpointing": "hardware.recompute",
    "mixed_precision": "hardware.precision",
    "dtype": "hardware.precision",
    "bf16": "hardware.precision",
    "fp16": "hardware.precision",
    "device": "hardware.accelerator",
    "dataset": "data.datasets",
    "sources": "data.datasets",
    "wandb_project": "logging.wandb",
}


class RunConfig(Knobs):
    """A run: what is trained, on what, how, where."""

    model: ModelConfig = ModelConfig()
    """The architecture."""
    tokenizer: TokenizerConfig = GPT2()
    """How text becomes tokens."""
    data: DataConfig
    """What is read, and in which order."""
    optimizer: OptimizerConfig = AdamWConfig()
    """How weights move."""
    scheduler: SchedulerConfig = OneCycleConfig()
    """How the learning rate moves."""
    training: TrainingConfig = TrainingConfig()
    """How long, how large, how often."""
    hardware: HardwareConfig = HardwareConfig()
    """On what, in which arithmetic."""
    logging: LoggingConfig = LoggingConfig()
    """What is shown and sent."""

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        for check in (_lengths, _vocabulary, _experts, _samples):
            wrong = check(self)
            if wrong:
                raise ValueError(wrong)
        return self


def _lengths(run: RunConfig) -> str | None:
    length, positions = run.training.sequence_length, run.model.max_position_embeddings
    if length > positions:
        return (
            f"training.sequence_length is {length}, more than model.max_position_embeddings {positions}; "
            "lower the one or raise the other"
        )
    depth = run.model.mtp.num_nextn_predict_layers
    if depth >= length:
        return (
            f"model.mtp.num_nextn_predict_layers is {depth}, but a row has training.sequence_length {length} tokens; "
            "depth k needs rows of more than k"
        )
    return None


def _vocabulary(run: RunConfig) -> str | None:
    size = run.model.vocab_size
    if isinstance(run.tokenizer, BPE) and size is not None and size < run.tokenizer.vocab_size:
        return (
            f"model.vocab_size is {size}, but tokenizer.vocab_size asks for {run.tokenizer.vocab_size} tokens; "
            "write model.vocab_size: null for the tokenizer's own size"
        )
    return None


def _experts(run: RunConfig) -> str | None:
    layers = run.model.num_hidden_layers
    if run.model.moe is None or any(run.model.moe.is_moe(layer) for layer in range(layers)):
        return None
    return (
        f"model.moe describes experts, but none of the {layers} layers is MoE; "
        "change moe.layers or moe.first_k_dense_replace, or write model.moe: null for a dense model"
    )


def _samples(run: RunConfig) -> str | None:
    training, positions = run.training, run.model.max_position_embeddings
    if training.sample_frequency is None:
        return None
    if not training.sample_prompts:
        return (
            f"training.sample_frequency is {training.sample_frequency}, but training.sample_prompts is empty; "
            "give prompts, or sample_frequency: null"
        )
    if training.sample_max_tokens >= positions:
        return (
            f"training.sample_max_tokens is {training.sample_max_tokens}, which leaves no room for a prompt in "
            f"model.max_position_embeddings {positions}; give less"
        )
    return None


def load_config(path: str | Path, overrides: Overrides = ()) -> RunConfig:
    """The configuration in a YAML file, with its bases and overrides (`section.key=value` texts, or a mapping).

    ConfigError names every mistake with its file and line.
    """
    return parse(read(path, overrides), RunConfig, SYNONYMS)
