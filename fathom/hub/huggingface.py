"""Hugging Face folders, both ways.

    export(config, weights, folder)     our weights -> config.json, safetensors, tokenizer: complete or absent
    pretrained(folder)                  such a folder -> our configuration, tokenizer, and tensors one at a time

What a family cannot hold, or a folder that is damaged or of another family, is refused by name before anything is
written. No weight is ever unpickled, and no code of a checkpoint is run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.errors import CheckpointError, ConfigError, DependencyError, TokenizerError
from fathom.hub.deepseek import DeepSeekV2, DeepSeekV3
from fathom.hub.family import BIAS, Family, Keys, Stream, Weights
from fathom.hub.fp8 import SCALE, Dequantised
from fathom.hub.grouped import Ernie, Llama, Mixtral, Qwen2Moe
from fathom.hub.lint import Finding, lint
from fathom.hub.names import blank_state, check_names, check_shapes, names_of, places
from fathom.hub.pre import pre_tokenizer
from fathom.hub.shards import Shards, Spec, write_shards
from fathom.log import log
from fathom.model.transformer import ModelConfig, Transformer
from fathom.tokenizer.tokenizer import Tokenizer

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (DeepSeekV3(), DeepSeekV2(), Qwen2Moe(), Ernie(), Mixtral(), Llama())
}
SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- out ------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A folder that was written: its files, its family, and what is known to go wrong with it where."""

    folder: Path
    family: str
    files: tuple[str, ...]
    findings: tuple[Finding, ...] = ()


def weights_of(model: Transformer) -> Weights:
    """A model's weights, under their names on disk; views, not copies."""
    return names_of(model.config).to_disk(model.state_dict())


def check_memory(config: ModelConfig) -> None:
    """ConfigError: a model with an n-gram memory, which is nobody's but ours."""
    if config.ngram is not None:
        raise ConfigError(
            "no other engine has a place for model.ngram, the memory of n-grams, and without it the model says "
            "something else. Serve the run with fathom serve, or train one with model.ngram: null"
        )


def choose(config: ModelConfig, weights: Weights, family: str = "auto") -> Family:
    """The family of that name, or with `auto` the first that can hold the model. ConfigError says why none can."""
    check_memory(config)
    if family != "auto":
        if family not in FAMILIES:
            raise ConfigError(f"there is no family {family}; possible are auto, {', '.join(FAMILIES)}")
        tried = {family: FAMILIES[family].obstacles(config, weights)}
    else:
        tried = {name: member.obstacles(config, weights) for name, member in FAMILIES.items()}
    for name, found in tried.items():
        if not found:
            return FAMILIES[name]
    near = {n: found for n, found in tried.items() if n.startswith("deepseek") == (config.attention.kind == "mla")}
    said = "\n  ".join(
        f"{name} cannot hold this model: {'; '.join(found)}"
        for name, found in (near if family == "auto" else tried).items()
    )
    raise ConfigError(said)


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The same model without its MTP depths."""
    return config.model_copy(update={"mtp": config.mtp.model_copy(update={"num_nextn_predict_layers": 0})})


def carried(config: ModelConfig, weights: Weights, family: str, mtp: bool | None) -> tuple[Family, ModelConfig]:
    """The family to export to, and the model as it will be there. mtp: with the MTP depths (True), without (False), or
    where the family has a place for them (None). ConfigError: impossible."""
    if mtp and not config.mtp.num_nextn_predict_layers:
        raise ConfigError("the export is asked for with MTP, and the model has none; leave that out")
    if config.mtp.num_nextn_predict_layers == 0 or mtp is False:
        plain = without_mtp(config)
        return choose(plain, weights, family), plain
    if mtp:
        return choose(config, weights, family), config
    target = choose(without_mtp(config), weights, family)
    if not target.obstacles(config, weights):
        return target, config
    log.warning("the MTP layers are left out: %s has no place for them", target.model_type)
    return target, without_mtp(config)


def export(
    config: ModelConfig,
    weights: Weights,
    folder: Path | str,
    tokenizer: Tokenizer | None = None,
    *,
    family: str = "auto",
    mtp: bool | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write a folder that transformers, vLLM, SGLang and others load.

    weights: a model's (`weights_of`) or a checkpoint's (`Shards`), under the names of `names.py`; read one at a time.
    family: auto, or a key of FAMILIES. mtp: as in `carried`. dtype: float32, bfloat16, float16, or None for that of
    the embedding; the selection bias stays float32.

    ConfigError: a model that the family cannot hold, a tokenizer that is larger than the model, an unknown option.
    CheckpointError: weights of another model, a folder that holds something, a disk that refuses. Then nothing is
    left behind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype}; possible are {', '.join(DTYPES)}")
    check_weights(config, weights)
    target, config = carried(config, weights, family, mtp)
    check_vocabulary(config, tokenizer)
    narrow = DTYPES[dtype] if dtype else weights["model.embed_tokens.weight"].dtype
    keys = {**target.describe(config), "dtype": str(narrow).removeprefix("torch."), **_token_ids(tokenizer)}
    specs = _specs(target, config, keys, narrow)
    findings = tuple(lint(keys, specs, None if tokenizer is None else pre_tokenizer(tokenizer)))
    for finding in findings:
        if finding.silent:
            log.warning("%s", finding)

    def tensors() -> Stream:
        for name, tensor in target.outward(config, keys, weights):
            yield name, _narrowed(name, tensor, torch.float32 if name.endswith(BIAS) else narrow)

    def write(place: Path) -> list[str]:
        names = write_shards(place, specs, tensors(), shard_bytes)
        _write_json(place / "config.json", keys)
        _write_json(place / "generation_config.json", _generation(tokenizer))
        if tokenizer is not None:
            tokenizer.save(place)
        return names

    folder = Path(folder)
    whole_or_absent(folder, write)
    files = tuple(sorted(path.name for path in folder.iterdir()))
    return Exported(folder, target.model_type, files, findings)


def check_weights(config: ModelConfig, weights: Weights) -> None:
    """CheckpointError unless the weights are those of the configuration, by name and shape."""
    blank = blank_state(config)
    table = places(config, blank)
    check_names(weights, table)
    check_shapes({name: shape_of(weights, name) for name in table}, table, blank)


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """ConfigError where the tokenizer has ids that the model has not."""
    size = config.vocab_size
    if tokenizer is not None and size is not None and tokenizer.vocab_size > size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {size}; give the tokenizer that the model "
            "was trained with"
        )


def shape_of(weights: Weights, name: str) -> torch.Size:
    """A tensor's shape, without reading it where that is possible."""
    if isinstance(weights, Shards | Dequantised):
        return torch.Size(weights.shape(name))
    return weights[name].shape


def blank_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors on disk without memory."""
    return names_of(config).to_disk(blank_state(config))


def _specs(target: Family, config: ModelConfig, keys: Keys, dtype: torch.dtype) -> dict[str, Spec]:
    blank = target.outward(config, keys, blank_weights(config))
    return {name: Spec(torch.float32 if name.endswith(BIAS) else dtype, tuple(t.shape)) for name, t in blank}


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and bool((narrow.isinf() & tensor.isfinite()).any()):
        raise ConfigError(f"{name} has numbers beyond the largest of float16; export bfloat16 or float32")
    return narrow


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """A padding token that is also another one stays unsaid: transformers would stop training its embedding."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    pad = tokenizer.pad_id
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": None if pad == tokenizer.eos_id else pad,
    }


def _generation(tokenizer: Tokenizer | None) -> dict[str, Any]:
    ids = _token_ids(tokenizer)
    if tokenizer is not None:
        ids["pad_token_id"] = tokenizer.pad_id
    return {key: value for key, value in ids.items() if value is not None}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def whole_or_absent(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a hidden folder beside the target, and rename it there once it is whole.

    CheckpointError: the target holds something, or the disk refuses.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already; choose another place, or delete it first")
    hidden = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        write(hidden)
        for path in hidden.rglob("*"):
            if path.is_file():
                _sync(path)
        if target.exists():
            target.rmdir()
        hidden.rename(target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def whole_file(target: Path, write: Callable[[Path], None]) -> Path:
    """The same for one file: `write` is given a hidden path beside the target."""
    if target.exists():
        raise CheckpointError(f"{target} is there already; choose another place, or delete it first")
    hidden = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(hidden)
        _sync(hidden)
        hidden.rename(target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        hidden.unlink(missing_ok=True)
    return target


def _refused(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {target}: {error.strerror or error}; nothing is left there. Free space, or choose another place"
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- in ------------------------------------------------------------


@dataclass(frozen=True)
class Pretrained:
    """A folder that was opened and checked: configuration, names and shapes fit. The weights are read when asked for.

    tokenizer: None where the folder has none.
    """

    folder: Path
    family: str
    config: ModelConfig
    keys: Keys
    weights: Weights
    tokenizer: Tokenizer | None = field(default=None)

    def tensors(self) -> Stream:
        """(name in the layout of `names.py`, tensor), one at a time. CheckpointError: a copy of the embedding or head
        that differs from it."""
        family = FAMILIES[self.family]
        for copy, original in family.copies(self.config).items():
            if copy in self.weights and not torch.equal(self.weights[copy], self.weights[original]):
                raise CheckpointError(
                    f"{self.folder}: {copy} differs from {original}, and in our model they are one; "
                    "train it elsewhere, or without that part"
                )
        yield from family.inward(self.config, self.keys, self.weights)

    def model(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Transformer:
        """The model with its weights, in eval mode; memory for the model and one tensor."""
        with torch.device("meta"):
            model = Transformer(self.config)
        model = model.to(dtype).to_empty(device=device)
        state, table = model.state_dict(), places(self.config)
        with torch.no_grad():
            for name, tensor in self.tensors():
                place = table[name]
                place.of(state[place.name]).copy_(tensor)
        return model.eval()

    def save(self, folder: Path | str, dtype: torch.dtype | None = None, shard_bytes: int | None = None) -> list[str]:
        """Write the weights into an existing folder as a run keeps them: model.safetensors, or shards if shard_bytes
        is given. dtype: None for that of each tensor. Memory for one tensor. Returns the files' names."""
        table, blank = places(self.config), blank_state(self.config)
        narrow = dtype or self.weights["model.embed_tokens.weight"].dtype
        specs = {
            name: Spec(torch.float32 if name.endswith(BIAS) else narrow, tuple(place.of(blank[place.name]).shape))
            for name, place in table.items()
        }
        stream = ((name, tensor.to(specs[name].dtype)) for name, tensor in self.tensors())
        most = shard_bytes or sum(spec.bytes for spec in specs.values())
        return write_shards(Path(folder), specs, stream, most)


def pretrained(folder: Path | str) -> Pretrained:
    """Open a Hugging Face folder: config.json, safetensors (one file, or shards with their index; FP8 in blocks is
    dequantised as it is read), and the tokenizer if it has one.

    ConfigError: another family, or a model that ours is not. CheckpointError: weights that are pickled, damaged,
    missing, unknown or of another shape; each is named.
    """
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file; give the folder that holds config.json and safetensors (pickled weights are not read)"
        )
    shards = Shards(folder)
    keys = read_keys(folder)
    family = FAMILIES[keys["model_type"]]
    try:
        weights = Dequantised.of(shards, keys)
        config = family.understand(keys, weights)
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # a text where a number belongs, and the like
        raise ConfigError(f"{folder / 'config.json'} cannot be read as a {family.model_type} model: {error}") from error
    _check_tensors(folder, family, config, keys, weights)
    return Pretrained(folder, family.model_type, config, keys, weights, _tokenizer(folder, keys, config))


def read_keys(folder: Path) -> dict[str, Any]:
    """The contents of config.json. ConfigError: none, or of a family that is not known."""
    path = folder / "config.json"
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
        kind = keys.get("model_type")
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json, which says what the weights mean") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"{path} is of the family {kind}; possible are {', '.join(FAMILIES)}")
    return keys


def _check_tensors(folder: Path, family: Family, config: ModelConfig, keys: Keys, weights: Weights) -> None:
    """Compare names and shapes with what an export of the same model would write."""
    expected = {name: t.shape for name, t in family.outward(config, keys, blank_weights(config))}
    copies = family.copies(config)
    optional = set(copies) - ({"lm_head.weight"} if not config.tie_word_embeddings else set())
    found = {name: shape_of(weights, name) for name in weights}
    needless = {n for n, shape in found.items() if 0 in shape or n.endswith(("rotary_emb.inv_freq", SCALE))}
    needless -= set(expected)
    try:
        check_names(set(found) - needless - optional, set(expected) - optional)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    for copy in optional & set(found):
        expected.setdefault(copy, expected[copies[copy]])
    wrong = [f"{n} is {list(found[n])}, not {list(s)}" for n, s in expected.items() if n in found and found[n] != s]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{folder}: the tensors do not fit config.json: {'; '.join(wrong[:3])}{more}; give the config.json that "
            "belongs to them"
        )


def _tokenizer(folder: Path, keys: Keys, config: ModelConfig) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file():
        log.warning("%s has no tokenizer.json; the model reads and writes token ids only", folder)
        return None
    try:
        tokenizer = Tokenizer.load(folder)
    except TokenizerError:
        tokenizer = Tokenizer.load(folder, eos=_end_by_id(folder, keys))
    if tokenizer.vocab_size > (config.vocab_size or 0):
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    return tokenizer


def _end_by_id(folder: Path, keys: Keys) -> str | None:
    """The end-of-text token that config.json names by its id. TokenizerError: the file is no tokenizer."""
    import tokenizers

    end = keys.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
    return backend.id_to_token(end) if isinstance(end, int) else None


def local_folder(name: Path | str) -> Path:
    """A local folder as it is; a hub name (owner/model) is fetched, safetensors and JSON only.

    DependencyError: huggingface_hub is not installed. CheckpointError: neither a folder nor a model that
    can be reached.
    """
    path = Path(name)
    if path.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        if not path.exists():
            raise CheckpointError(
                f"there is no folder {name}; give a folder, or a hub name such as deepseek-ai/DeepSeek-V2-Lite"
            )
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DependencyError(
            'models are fetched with huggingface_hub, which is not installed: pip install "fathom-lm[hub]"'
        ) from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except Exception as error:  # every kind of network and hub error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no folder {name}, and the hub has no answer ({first}); give a local folder"
        ) from None
