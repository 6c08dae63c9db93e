"""The door that makes a run: configuration in, run folder out. The one place where the parts are introduced to each
other; none of them is handed more than its own branch of the configuration.

    world and device -> run folder -> tokenizer -> token shards -> model -> optimizer -> trainer -> fit
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fathom.batch import Batch
from fathom.config.file import Overrides
from fathom.config.text import dump
from fathom.data.corpus import Corpus, has_split, open_data, training_texts
from fathom.distributed.data_parallel import DataParallel
from fathom.distributed.recompute import recomputed
from fathom.errors import ConfigError, UserError
from fathom.evaluate.loss import Measured, measure
from fathom.evaluate.samples import samples
from fathom.generate.request import SamplingParams
from fathom.hub.names import names_of
from fathom.load import TOKENIZER, Run, read_config, read_tokenizer, split
from fathom.log import log
from fathom.model.cost import Cost
from fathom.model.float8 import train_in_float8
from fathom.model.init import init_weights
from fathom.model.loss import Losses, language_model_loss
from fathom.model.transformer import Transformer
from fathom.optim.build import build_optimizer
from fathom.optim.schedule import build_schedule
from fathom.recipe import RunConfig, load_config
from fathom.runtime.compile import compiled
from fathom.runtime.device import Device, set_up
from fathom.runtime.seed import seed_everything, stream
from fathom.runtime.world import World
from fathom.tokenizer.tokenizer import Tokenizer
from fathom.tokenizer.train import build as build_tokenizer
from fathom.train.callbacks import Callback, Evaluated, StepReport
from fathom.train.checkpoint import Checkpoint, RunFolder
from fathom.train.metrics import build_callbacks
from fathom.train.trainer import Trainer
from fathom.version import __version__

T = TypeVar("T")
FREE = ("training.output_dir", "training.keep", "hardware.", "logging.")  # what a resume may change without a word
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "pydantic")


def train(config: str | Path | RunConfig, overrides: Overrides = (), *, resume: str | Path | None = None) -> Run:
    """Train a model and return it, in eval mode.

    config: a YAML file, or a whole configuration (then without overrides). resume: a run to go on with, `RUN` or
    `RUN@500`; its folder takes the place of training.output_dir.

    UserError: whatever a person can mend, before anything is written where that can be told; a run that breaks off
    keeps its last checkpoint. After SIGINT or SIGTERM the run is saved and returned with its `signal` set.
    """
    run = config if isinstance(config, RunConfig) else load_config(config, overrides)
    if isinstance(config, RunConfig) and overrides:
        raise ConfigError("overrides go with a YAML file; change a RunConfig with model_copy before it is handed over")
    world = World.from_environment()
    if world.size > run.training.batch_size:
        raise ConfigError(
            f"training.batch_size is {run.training.batch_size}, less than the {world.size} processes that were "
            "started; every process needs at least one row: raise it, or start fewer"
        )
    earlier = None if resume is None else Earlier.find(resume)
    if earlier is not None:
        run = earlier.taken_up(run)
    device = set_up(run.hardware, recorded=earlier.environment if earlier else None, local_rank=world.local_rank)
    world.join(device.torch_device)
    try:
        return _train(run, world, device, earlier)
    finally:
        world.leave()


@dataclass(frozen=True)
class Earlier:
    """A run that is gone on with: its folder, the checkpoint asked for (None: it was killed before its first), the
    configuration that it had, and what environment.json says."""

    folder: RunFolder
    checkpoint: Checkpoint | None
    config: RunConfig | None
    environment: Mapping[str, Any]

    @classmethod
    def find(cls, path: str | Path) -> Earlier:
        """Raises CheckpointError: no run there, or no whole checkpoint."""
        folder, which = split(path)
        checkpoint = folder.find(which) if folder.begun or which else None
        config = read_config(folder) if (folder.path / "config.yaml").is_file() else None
        try:
            environment = json.loads((folder.path / "environment.json").read_text("utf-8")).get("device", {})
        except (OSError, ValueError, AttributeError):
            environment = {}
        return cls(folder, checkpoint, config, environment)

    def taken_up(self, run: RunConfig) -> RunConfig:
        """The configuration that the run goes on with. ConfigError: another model or tokenizer."""
        run = _with_output(run, self.folder.path)
        before = self.config
        if before is None:
            return run
        asked = run.model
        if asked.vocab_size is None:
            run = run.model_copy(update={"model": asked.model_copy(update={"vocab_size": before.model.vocab_size})})
        changed = differences(before.model_dump(mode="json"), run.model_dump(mode="json"))
        fixed = [name for name in changed if name.startswith(("model.", "tokenizer."))]
        if fixed and self.checkpoint is not None:
            raise ConfigError(
                f"{self.folder.path} was begun with another {' and '.join(sorted({n.split('.')[0] for n in fixed}))}: "
                + "; ".join(f"{name} was {changed[name][0]}, is {changed[name][1]}" for name in fixed[:5])
                + f". Go on with its own configuration: fathom train {self.folder.path}/config.yaml --resume "
                f"{self.folder.path}"
            )
        told = [name for name in changed if not name.startswith(FREE)]
        if told:
            log.warning(
                "the run goes on with changes: %s",
                "; ".join(f"{name} was {changed[name][0]}, is {changed[name][1]}" for name in told),
            )
        return run


def differences(before: Any, after: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, after) of everything that two plain trees do not share."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {**before, **after}:
            found |= differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if before == after else {path: (before, after)}


def _with_output(run: RunConfig, folder: Path) -> RunConfig:
    return run.model_copy(update={"training": run.training.model_copy(update={"output_dir": str(folder)})})


# --- the parts, one after the other ------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """What a run stands on: its folder, its configuration with the vocabulary filled in, tokenizer and text."""

    folder: RunFolder
    run: RunConfig
    tokenizer: Tokenizer
    text: Corpus
    held_out: Corpus | None


def _train(run: RunConfig, world: World, device: Device, earlier: Earlier | None) -> Run:
    ground = _on_first(world, lambda: _lay(run, earlier), lambda: _stand_on(run))
    run, folder, tokenizer = ground.run, ground.folder, ground.tokenizer
    model = build_model(run, device)
    if model.memory is not None:
        model.memory.count(ground.text.beginning(model.memory.config.tokens))
        if world.is_first:
            model.memory.save(folder.path)
    cost = Cost(run.model)
    if world.is_first:
        _write_facts(folder, run, cost, device, world)
        _introduce(run, cost, ground, device, world)
    ranks = DataParallel(model, world)
    optimizer = build_optimizer(model, run.optimizer, device.dtype)
    loader = ground.text.train_loader(
        batch_size=run.training.batch_size,
        sequence_length=run.training.sequence_length,
        seed=stream(run.training.seed, "data"),
        rank=world.rank,
        world=world.size,
    )
    last = _Last()
    checkpoint = earlier.checkpoint if earlier else None
    trainer = Trainer(
        run.training,
        model,
        build_objective(run),
        optimizer,
        build_schedule(run.scheduler, run.training.max_steps, run.optimizer.lr),
        loader,
        device,
        world=world,
        gradient_clip=run.hardware.gradient_clip,
        sum_gradients=ranks.sum_gradients,
        folder=folder,
        names=names_of(run.model),
        evaluate=_evaluation(run, model, tokenizer, ground.held_out, device, world),
        sample=_sampling(run, model, tokenizer, device),
        after_step=[model.balance_step],
        biases=lambda: {n: layer.gate.e_score_correction_bias for n, layer in model.moe_layers().items()},
        callbacks=[*_listeners(run, folder, cost, device, world, checkpoint), last] if world.is_first else [],
    )
    seed_everything(run.training.seed, "training", world.rank)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        log.info("going on after step %d of %s", checkpoint.step, folder.path)
    try:
        finish = trainer.run()
    finally:
        loader.close()
    return Run(folder.path, finish.step, run, model.eval(), tokenizer, device.torch_device, last.metrics, finish.signal)


def _on_first(world: World, work: Callable[[], T], follow: Callable[[], T]) -> T:
    """Let rank 0 work and the others then find it done; a mistake of the user's that rank 0 meets is told by all."""
    found: list[T] = []
    problem: UserError | None = None
    if world.is_first:
        try:
            found.append(work())
        except UserError as error:
            problem = error
    for told in world.gather(problem):
        if told is not None:
            raise told
    return found[0] if found else follow()


def _lay(run: RunConfig, earlier: Earlier | None) -> Ground:
    """Make everything that a run stands on. The folder comes last, so that a mistake in the data leaves none behind."""
    folder = RunFolder(run.training.output_dir)
    begun = earlier is not None and (folder.path / TOKENIZER / "tokenizer.json").is_file()
    if earlier is None and (folder.path / "run.json").exists():
        RunFolder.create(folder.path)  # refuses, before a tokenizer is trained for nothing
    tokenizer = read_tokenizer(folder) if begun else build_tokenizer(run.tokenizer, lambda: training_texts(run.data))
    run = _sized(run, tokenizer)
    text, held_out = _texts(run, tokenizer)
    if earlier is None:
        RunFolder.create(folder.path, {"fathom": __version__})
    if not begun:
        tokenizer.save(folder.path / TOKENIZER)
    folder.write("config.yaml", dump(run))
    folder.write("hparams.yaml", dump(_flat(run.model_dump(mode="json"))))
    return Ground(folder, run, tokenizer, text, held_out)


def _stand_on(run: RunConfig) -> Ground:
    """What rank 0 made, for the other ranks."""
    folder = RunFolder.open(run.training.output_dir)
    tokenizer = read_tokenizer(folder)
    run = _sized(run, tokenizer)
    return Ground(folder, run, tokenizer, *_texts(run, tokenizer))


def _texts(run: RunConfig, tokenizer: Tokenizer) -> tuple[Corpus, Corpus | None]:
    """The training text, and the validation text if there is any."""
    held_out = open_data(run.data, tokenizer, "validation") if has_split(run.data, "validation") else None
    return open_data(run.data, tokenizer, "train"), held_out


def _sized(run: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The configuration with the model's vocabulary. ConfigError: it is smaller than the tokenizer's."""
    size = run.model.vocab_size
    if size is not None and size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {size}, but the tokenizer has {tokenizer.vocab_size} tokens; "
            "write model.vocab_size: null for its own size"
        )
    if size is not None:
        return run
    return run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": tokenizer.vocab_size})})


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A tree as one level of dotted keys, which is what tools that compare runs read."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        flat |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return flat


def build_model(run: RunConfig, device: Device) -> Transformer:
    """The model with its initial weights, ready for a trainer; run.model.vocab_size must be known."""
    model = Transformer(run.model)
    init_weights(model, stream(run.training.seed, "init"))
    model.to(device.torch_device)
    for layer in model.moe_layers().values():
        layer.row_multiple = device.row_multiple
    if run.hardware.float8 is not None:
        count = train_in_float8(model, run.hardware.float8)
        log.info("float8 (%s): %d matrices", run.hardware.float8, count)
    if run.hardware.compile:
        for block in (*model.layers, *model.mtp):
            _compile(block, device)
    if run.hardware.recompute:
        model.run_block = recomputed(model.run_block)
    return model


def _compile(block: nn.Module, device: Device) -> None:
    """Compile a block for training. Evaluation and samples run it as it is: their shapes change from call to call, and
    compiled shapes are fixed."""
    plain, fast = block.forward, compiled(block.forward, device.torch_device)

    def forward(*arguments: Any) -> Any:
        return (fast if block.training else plain)(*arguments)

    block.forward = forward


def build_objective(run: RunConfig) -> Callable[..., Losses]:
    """The loss with the MTP weight of the moment."""
    mtp = run.model.mtp

    def objective(model: Transformer, batch: Batch, *, token_count: int, batch_share: float, progress: float) -> Losses:
        return language_model_loss(
            model, batch, token_count=token_count, batch_share=batch_share, mtp_weight=mtp.weight_at(progress)
        )

    return objective


def _evaluation(
    run: RunConfig, model: Transformer, tokenizer: Tokenizer, held_out: Corpus | None, device: Device, world: World
) -> Callable[[], Measured] | None:
    """How the trainer evaluates: the validation text, in the run's own arithmetic."""
    training = run.training
    if held_out is None:
        log.warning("there is no validation text (data.validation_fraction is 0), so nothing is evaluated")
        return None

    def evaluate() -> Measured:
        batches = held_out.evaluation_batches(
            batch_size=training.batch_size,
            sequence_length=training.sequence_length,
            limit=training.eval_batches,
            rank=world.rank,
            world=world.size,
        )
        with device.arithmetic(), device.autocast():
            return measure(model, batches, tokenizer.token_bytes, world=world, ahead=False)

    return evaluate


def _sampling(
    run: RunConfig, model: Transformer, tokenizer: Tokenizer, device: Device
) -> Callable[[int], list[tuple[str, str]]]:
    training = run.training
    params = SamplingParams(
        max_tokens=training.sample_max_tokens,
        temperature=training.sample_temperature,
        top_p=training.sample_top_p,
        top_k=training.sample_top_k,
    )

    def sample(step: int) -> list[tuple[str, str]]:
        with device.arithmetic(), device.autocast():
            return samples(model, tokenizer, training.sample_prompts, params, seed=training.seed, step=step)

    return sample


def _listeners(
    run: RunConfig, folder: RunFolder, cost: Cost, device: Device, world: World, checkpoint: Checkpoint | None
) -> list[Callback]:
    return build_callbacks(
        run.logging,
        folder.path,
        logging_steps=run.training.logging_steps,
        max_steps=run.training.max_steps,
        after_step=checkpoint.step if checkpoint else 0,
        flops_per_token=cost.training_flops_per_token(run.training.sequence_length),
        peak_flops=device.peak_flops * world.size,
        settings=_flat(run.model_dump(mode="json")),
    )


class _Last(Callback):
    """Remembers the last figures, for whoever called."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def on_step(self, report: StepReport) -> None:
        self.metrics |= {"train_loss": report.loss, "tokens": report.tokens_seen, "seconds": report.elapsed}
        if report.seconds > 0:
            self.metrics["tokens_per_second"] = report.tokens / report.seconds

    def on_evaluation(self, step: int, evaluated: Evaluated) -> None:
        self.metrics |= {"val_loss": evaluated.loss, "val_bpb": evaluated.bits_per_byte}


# --- what is said and written about a run ------------------------------------------------------


def _introduce(run: RunConfig, cost: Cost, ground: Ground, device: Device, world: World) -> None:
    training = run.training
    step = training.batch_size * training.gradient_accumulation_steps * training.sequence_length
    extra = cost.mtp_parameters()
    log.info(
        "model   %s parameters, %s active%s; %s attention",
        f"{cost.parameters():,}",
        f"{cost.active_parameters():,}",
        f", and {extra:,} of MTP" if extra else "",
        run.model.attention.kind.upper(),
    )
    log.info(
        "data    %s tokens in %s documents; %s held out for validation",
        f"{ground.text.tokens:,}",
        f"{ground.text.documents:,}",
        f"{ground.held_out.tokens:,}" if ground.held_out else "none",
    )
    many = f" on each of {world.size} ranks" if world.size > 1 else ""
    arithmetic = str(device.dtype).removeprefix("torch.") + (" (products in float32)" if device.emulates else "")
    log.info(
        "device  %s, %s, %d threads%s%s; %.0f GFLOP/s %s",
        device.name,
        arithmetic,
        device.threads,
        many,
        f", experts' rows by {device.row_multiple}" if device.row_multiple > 1 else "",
        device.peak_flops / 1e9,
        device.peak_source,
    )
    log.info("run     %s: %s steps of %s tokens", training.output_dir, f"{training.max_steps:,}", f"{step:,}")


def _write_facts(folder: RunFolder, run: RunConfig, cost: Cost, device: Device, world: World) -> None:
    facts = {
        "parameters": cost.parameters(),
        "active_parameters": cost.active_parameters(),
        "mtp_parameters": cost.mtp_parameters(),
        "fathom": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "world": world.size,
        "device": device.facts(),
        "kernels": {
            "experts": run.model.moe.experts_implementation if run.model.moe else None,
            "compile": run.hardware.compile,
            "recompute": run.hardware.recompute,
        },
    }
    folder.write("environment.json", json.dumps(facts, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree, where it is one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
