"""One family of errors for everything that a person can mend.

A message says what was given, what is possible and what to change. `cli/` prints it without a traceback and exits
with code 2; a bug raises anything else and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something that the user gave, or the user's machine, stands in the way; the message says how to mend it."""


class ConfigError(UserError):
    """A configuration that cannot be read, or that contradicts itself."""


class DataError(UserError):
    """A data source or a token shard that is missing, empty, unreadable or of the wrong kind."""


class TokenizerError(UserError):
    """A tokenizer that cannot be made, found or used."""


class CheckpointError(UserError):
    """A run folder or checkpoint that is missing, damaged, incomplete or of another model."""


class TrainingError(UserError):
    """A training that cannot go on: too many non-finite steps, no space left, a loss that never was a number."""


class RequestError(UserError):
    """A request for generated text that cannot be honoured."""


class DependencyError(UserError):
    """An optional package that is needed and not installed; the message has the command that installs it."""
