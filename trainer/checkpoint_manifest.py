"""What a checkpoint is: one manifest, written last, that lists everything else (pure)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from data_shards import signed_json
from data_shards.errors import CorruptFile
from trainer.rank_file import RankFile

KIND = "baton-checkpoint"
VERSION = 5
"""1 had no ``progress.eval_step``; 1 and 2 had the block hashes of rank files in the manifest."""
_VERSION_OF_FAST, _VERSION_OF_DURABLE = 4, 3
"""3 had no ``files_at`` either, and neither had ``_LATER_FIELDS``: a manifest without them is as it was then, and older
readers take it"""
_LATER_FIELDS = (
    "skipped_steps",
    "skipped_in_a_row",
    "best_eval_loss",
    "best_eval_step",
    "improved_eval_loss",
    "evaluations_without_improvement",
)
"""Of ``progress``, which are left out where there is none of them."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything that is not a tensor and must survive."""

    step: int = 0
    rows_consumed: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """wall seconds of rank 0 by kind (the parts of a step, evaluation, checkpoint), over the attempts that led here"""
    last_loss: float | None = None
    eval_loss: float | None = None
    first_eval_loss: float | None = None
    eval_step: int | None = None
    """step of ``eval_loss``"""
    best_eval_loss: float | None = None
    """the lowest"""
    best_eval_step: int | None = None
    """its step; None also where a release that did not note it found it"""
    improved_eval_loss: float | None = None
    """the last that was lower than the one before it here by more than ``evaluation.min_improvement``"""
    evaluations_without_improvement: int = 0
    """the last ones"""
    skipped_steps: int = 0
    """whose update was left out"""
    skipped_in_a_row: int = 0
    """the last ones"""

    @property
    def evaluated_here(self) -> bool:
        """Whether ``eval_loss`` is that of these very weights."""
        return self.eval_loss is not None and self.eval_step == self.step


@dataclass(frozen=True)
class ParameterEntry:
    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointManifest:
    """Rank r of ``world_size`` holds elements ``[r*c, min((r+1)*c, n))`` of each parameter, c = ceil(n / W), as tensors
    ``<name>/fp32`` and ``<name>/<state key>`` of ``files[r]``."""

    attempt: str
    created: str
    """UTC, ISO 8601"""
    world_size: int
    parameters: tuple[ParameterEntry, ...]
    """trained ones only"""
    optimizer: dict[str, Any]
    """``name``, ``step``, ``state_keys``"""
    progress: Progress
    fingerprint: str
    """of the dataset"""
    base: str
    """identity of the base model"""
    config: dict[str, Any]
    """the run's resolved configuration"""
    versions: dict[str, str]
    files: tuple[RankFile, ...]
    """by rank"""
    files_at: str | None = None
    """Of the fast tier: the folder on the nodes' own disks whose folder of the checkpoint's name holds ``files``, each
    node its ranks'. None: they lie beside the manifest."""

    @property
    def fast(self) -> bool:
        """It goes with the nodes that hold it."""
        return self.files_at is not None

    def to_bytes(self) -> bytes:
        payload = asdict(self) | {"files": [entry.to_json() for entry in self.files]}
        if not self.fast:
            del payload["files_at"]
        version = VERSION
        if not any(payload["progress"][name] for name in _LATER_FIELDS):
            version = _VERSION_OF_FAST if self.fast else _VERSION_OF_DURABLE
            for name in _LATER_FIELDS:
                del payload["progress"][name]
        return signed_json.encode(payload, KIND, version)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> CheckpointManifest:
        """Raises CorruptFile unless it is whole, ours, of a known version, and names only files beside itself."""
        body = signed_json.decode(data, KIND, VERSION, where)
        try:
            manifest = cls(
                **body
                | {
                    "parameters": tuple(ParameterEntry(p["name"], tuple(p["shape"])) for p in body["parameters"]),
                    "progress": Progress(**body["progress"]),
                    "files": tuple(RankFile.from_json(value, where) for value in body["files"]),
                }
            )
            manifest._check_types()
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile(f"{where}: a field is missing or of the wrong type ({error})") from error
        if len(manifest.files) != manifest.world_size:
            raise CorruptFile(f"{where}: lists {len(manifest.files)} files for {manifest.world_size} ranks")
        return manifest

    def _check_types(self) -> None:
        """Of what tells its name, its files and its rank among others. Raises TypeError."""
        for name, value, types in (
            ("attempt", self.attempt, (str,)),
            ("world_size", self.world_size, (int,)),
            ("step", self.progress.step, (int,)),
            ("eval_loss", self.progress.eval_loss, (float, int, type(None))),
            ("best_eval_loss", self.progress.best_eval_loss, (float, int, type(None))),
            ("improved_eval_loss", self.progress.improved_eval_loss, (float, int, type(None))),
            ("evaluations_without_improvement", self.progress.evaluations_without_improvement, (int,)),
        ):
            if type(value) not in types:  # no bool, which is an int
                raise TypeError(f"{name} is of type {type(value).__name__}")
