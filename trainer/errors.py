"""What can go wrong while training, each saying whether another attempt can help."""

from __future__ import annotations

from data_shards.errors import BadInput, BatonError, CorruptFile


class ModelError(BadInput):
    """The base model can't be used: not there, not allowed, or in a format that could execute code."""


class CheckpointUnusable(BatonError):
    """Training can't go on from this committed checkpoint; it may from an older one."""

    retryable = True

    def __init__(self, checkpoint: str, problem: str) -> None:
        super().__init__(f"checkpoint {checkpoint}: {problem}")
        self.checkpoint = checkpoint
        self.problem = problem

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.checkpoint, self.problem)


class CheckpointCorrupt(CheckpointUnusable, CorruptFile):
    """It does not read back as written."""


class BringingFailed(BatonError):
    """Files of a checkpoint of the fast tier could not be copied to the nodes that need them; they may be next time."""

    retryable = True


class CheckpointOutOfReach(CheckpointUnusable):
    """It is gone, or of the fast tier, and the nodes that are here do not have all of it."""


class RunHeld(BatonError):
    """Another launcher holds the run: it did when this one was started, or it took the run over since."""


class StepInvariantBroken(BatonError):
    """A step did not do what its plan says: rows or trained tokens are off. Training on would be silently wrong."""


class SaveFailed(BatonError):
    """A save did not become a checkpoint; what was committed before it stands."""

    retryable = True


class DiskFull(SaveFailed):
    """There is no room for a save and nothing may be removed. Somebody must make room; then the run goes on."""


class NonFiniteStep(BatonError):
    """Loss or gradients became inf or NaN; the same rows would do it again."""


class NonFiniteAgain(NonFiniteStep):
    """The same, where it may have been a machine's fault: another attempt finds out."""

    retryable = True
    recurs = True
    """else the next attempt has it at the same step, and is the last"""


class OutOfMemory(BatonError):
    """A worker needs more memory than there is; the same step would need it again."""


class OutOfMemoryLate(OutOfMemory):
    """After many steps that fitted: fragmentation, or a neighbour. Another attempt has memory that is whole."""

    retryable = True
    recurs = True
