"""Errors for users: one sentence each, and the command line's exit code."""

from __future__ import annotations


class SamplerError(Exception):
    """An error in one sentence that names the thing, what is allowed and what to do.

    code: the command line's exit code; 1 is an internal error.
    """

    code: int = 1


class UsageError(SamplerError):
    """A wrong option, configuration or prompt file."""

    code = 2


class IncompleteError(SamplerError):
    """A run or a check that ended with failed items."""

    code = 3


class RunFolderError(SamplerError):
    """A run folder that is locked or belongs to another plan."""

    code = 4


class StorageError(SamplerError):
    """A file or folder that cannot be read or written."""

    code = 5


class ModelError(SamplerError):
    """A model that was not found, is not supported or failed to load."""

    code = 6


class MemoryLimitError(SamplerError):
    """Too little memory even at batch size 1."""

    code = 7


def first_line(error: BaseException) -> str:
    """First line of another library's error message; the class name of an empty one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
