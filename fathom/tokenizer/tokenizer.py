"""A tokenizer: text -> ids -> text, wrapped around one `tokenizers.Tokenizer`.

Saved as `tokenizer.json` with the two small files that `transformers.AutoTokenizer` wants beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from fathom.errors import TokenizerError
from fathom.tokenizer.chat import JINJA
from fathom.tokenizer.token_bytes import bytes_of_tokens

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|im_end|>", "<|end_of_text|>")
KNOWN_BEGINNINGS = ("<｜begin▁of▁sentence｜>", "<s>", "<bos>", "<|begin_of_text|>")
KNOWN_PADS = ("<｜▁pad▁｜>", "<pad>", "<|pad|>")


class Tokenizer:
    """Encode and decode; no special token is ever added by itself, and special tokens written in a text are text."""

    def __init__(self, backend: tokenizers.Tokenizer, *, eos: str | None = None, bos: str | None = None) -> None:
        self.backend = backend
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()  # a tokenizer.json may ask for either, and either would lose or add text
        self.backend.no_padding()
        self.bos = bos if bos is not None else self._known(KNOWN_BEGINNINGS)
        end = eos if eos is not None else self._known(KNOWN_ENDS)
        if end is None or backend.token_to_id(end) is None:
            raise TokenizerError(
                f"The tokenizer has no end-of-text token (looked for {', '.join([eos] if eos else KNOWN_ENDS)}), which "
                "documents end with. Add one to its tokenizer.json, or name it: tokenizer.eos_token."
            )
        self.eos: str = end

    def _known(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if self.backend.token_to_id(name) is not None), None)

    @cached_property
    def eos_id(self) -> int:
        """The token that every document ends with."""
        return self._id(self.eos)

    def _id(self, name: str) -> int:
        found = self.backend.token_to_id(name)
        assert found is not None, name
        return found

    @property
    def bos_id(self) -> int | None:
        """The token that a text begins with, if the tokenizer has one; data does not add it."""
        return None if self.bos is None else self.backend.token_to_id(self.bos)

    @property
    def pad_id(self) -> int:
        """The token that fills up rows; the end-of-text token if there is no other."""
        name = self._known(KNOWN_PADS)
        return self.eos_id if name is None else self._id(name)

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides which ids a text gets."""
        return hashlib.sha256((self.backend.to_str() + str(self.eos)).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of text that each id stands for; b"" for special tokens, the unknown one among them."""
        return bytes_of_tokens(self.backend, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. TokenizerError: it has a word that the tokenizer has no token for."""
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:
            if type(error) is not Exception:  # which `tokenizers` raises, and no other
                raise
            raise self._wordless(error) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, in parallel. TokenizerError: as `encode`."""
        try:
            return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:
            if type(error) is not Exception:  # which `tokenizers` raises, and no other
                raise
            raise self._wordless(error) from error

    def _wordless(self, error: Exception) -> TokenizerError:
        few = ", ".join(map(repr, sorted(self.backend.get_vocab(), key=len)[:3]))
        return TokenizerError(
            f"The text has a word that this tokenizer has no token for ({error}); its {self.vocab_size} tokens are "
            f"such as {few}. A model that came without a tokenizer reads token ids: numbers, with spaces between."
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out, ids beyond the vocabulary (padding of V) too."""
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self.backend.decode(known, skip_special_tokens=True)

    def stream(self) -> StreamDecoder:
        """A decoder that is fed one token at a time."""
        return StreamDecoder(self)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.backend.encode_special_tokens = False  # a property of the wrapper, not of the file
        try:
            self.backend.save(str(path / "tokenizer.json"))
        finally:
            self.backend.encode_special_tokens = True
        special = {"eos_token": self.eos, "pad_token": self._known(KNOWN_PADS) or self.eos}
        if self.bos is not None:
            special["bos_token"] = self.bos
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            "chat_template": JINJA,
        }
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (path / "special_tokens_map.json").write_text(json.dumps(special, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path | str, *, eos: str | None = None) -> Tokenizer:
        """Read a tokenizer.json, or a folder that holds one."""
        file = Path(path)
        folder = file if file.is_dir() else file.parent
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.exists():
            raise TokenizerError(
                f"There is no tokenizer at {file}. Give the path of a tokenizer.json or of its folder."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"{file} is no tokenizer.json that `tokenizers` can read: {error}") from error
        named: dict[str, str | None] = {"eos_token": None, "bos_token": None}
        beside = folder / "tokenizer_config.json"
        if beside.exists():
            try:
                said = json.loads(beside.read_text("utf-8"))
            except ValueError as error:
                raise TokenizerError(f"{beside} is no JSON: {error}. Correct or remove it.") from error
            for key in named:
                value = said.get(key)
                named[key] = value.get("content") if isinstance(value, dict) else value
        return cls(backend, eos=eos or named["eos_token"], bos=named["bos_token"])


class StreamDecoder:
    """Text of tokens as they come; holds back what may still change, such as half of a UTF-8 character.

    The concatenation of all pieces equals `Tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # ids before it are only context, so that a decoder that trims a leading space does so once
        self._end = 0  # ids before it have been given out

    def push(self, token: int) -> str:
        """Add a token; the text that is certain now, perhaps empty."""
        self._ids.append(int(token))
        before = self._tokenizer.decode(self._ids[self._start : self._end])
        now = self._tokenizer.decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("�"):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What was held back, once no token will follow."""
        before = self._tokenizer.decode(self._ids[self._start : self._end])
        now = self._tokenizer.decode(self._ids[self._start :])
        self._start, self._end = self._end, len(self._ids)
        return now[len(before) :]


def batched(texts: Iterable[str], characters: int = 1 << 20) -> Iterable[list[str]]:
    """Group texts so that a batch has about so many characters: what `encode_batch` is fed with."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group
