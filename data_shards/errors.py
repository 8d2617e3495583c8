"""Errors that the person who started the run can act on."""

from __future__ import annotations


class BatonError(Exception):
    """Base of every error that Baton raises on purpose.

    ``retryable`` says whether starting again from the last commit can help. ``str(error)`` is complete: what is wrong,
    where, the likely cause, and what to do.
    """

    retryable = False


class BadInput(BatonError):
    """Something the user gave is wrong; nothing was started (exit code 2)."""


class DataError(BadInput):
    """A record, a template or a dataset can't be used as it is."""

    @classmethod
    def at(cls, path: str, line: int, problem: str) -> DataError:
        """An error that points at one record: ``path:line: problem``. Lines count from 1."""
        return cls(f"{path}:{line}: {problem}")


class CorruptFile(BatonError):
    """A file that we wrote is not what we wrote: truncated, changed, or not ours."""


class DatasetCorrupt(CorruptFile):
    """A file of a prepared dataset is not what its manifest says, as it is read here; elsewhere it may be."""

    def __init__(self, dataset: str, file: str, problem: str) -> None:
        """
        Args:
            dataset: its URI.
            file: relative to the dataset's folder.
        """
        super().__init__(f"{problem}. To prepare the dataset anew, delete {dataset} and run the same command again")
        self.dataset = dataset
        self.file = file
        self.problem = problem

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.dataset, self.file, self.problem)
