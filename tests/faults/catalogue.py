"""The faults that a run must survive, by number, each with what injects it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import computing, inputs, launchers, nodes, processes, storage, stuck
from tests.faults.bench import Bench, Result


@dataclass(frozen=True)
class Fault:
    number: int
    name: str
    how: str
    """it is injected"""
    inject: Callable[[Bench], Result] | None = None
    """Raises AssertionError where the run did not survive it, NotHere where this machine can't have it."""
    fast: bool = False
    """tried with every change"""
    tests: tuple[str, ...] = ()
    """files of other tests that inject it, or more of it"""


FAULTS = (
    Fault(1, "SIGKILL of rank 0", "at a step", processes.kill_rank_0, fast=True),
    Fault(2, "SIGKILL of another rank", "at a step", processes.kill_rank_1),
    Fault(
        3,
        "SIGTERM, and then the grace ends",
        "the last save is slow; SIGKILL to the driver in its midst",
        processes.grace_too_short,
    ),
    Fault(4, "SIGSTOP", "to a worker at a step; the watchdog's limit is 3 s", stuck.stopped),
    Fault(
        5,
        "a thread that holds the GIL",
        "a native call that never lets go of it; the watchdog's limit is 3 s",
        stuck.holds_the_interpreter,
    ),
    Fault(6, "segmentation fault", "a worker reads address 0 at a step", processes.segfault),
    Fault(7, "exception on one rank", "raised in a worker at a step", processes.exception, fast=True),
    Fault(8, "two ranks at once", "SIGKILL of both at the same step", processes.kill_both),
    Fault(
        9,
        "death during recovery",
        "SIGKILL at a step, and of the next attempt while it reads the checkpoint",
        processes.kill_again_while_recovering,
        fast=True,
    ),
    Fault(
        10,
        "hang in a collective",
        "a worker sleeps where the other waits in a collective; the watchdog's limit is 3 s",
        stuck.never_joins,
        tests=("integration/test_hang.py",),
    ),
    Fault(
        11,
        "death before the first checkpoint",
        "SIGKILL one step before it",
        processes.kill_before_the_first_checkpoint,
    ),
    Fault(
        12,
        "kill at every write point of a save",
        "SIGKILL at five of them; `make chaos`: at every one",
        storage.kill_while_saving,
        tests=("integration/test_chaos.py",),
    ),
    Fault(
        13,
        "kill during background persist",
        "a save that takes long behind training; SIGKILL of the process that writes it",
        storage.kill_while_persisting,
    ),
    Fault(
        14,
        "kill during retention",
        "SIGKILL between the removal of a checkpoint's manifest and that of its files",
        storage.kill_while_removing,
    ),
    Fault(
        15,
        "kill during export",
        "SIGKILL before the weights' file gets its name",
        storage.kill_while_exporting,
        tests=("integration/test_killed_export.py",),
    ),
    Fault(
        16,
        "disk full",
        "a file system with room for a checkpoint and a half",
        storage.disk_full,
        tests=("integration/test_recovery.py",),
    ),
    Fault(
        17,
        "I/O error, read-only directory",
        "EIO from one write; from a step on EROFS from all (fault points)",
        storage.disk_fails,
        tests=("integration/test_saving.py",),
    ),
    Fault(
        18,
        "truncated shard",
        "of the newest checkpoint a rank's file is cut in half",
        storage.truncated,
        tests=("unit/test_corrupt_checkpoints.py",),
    ),
    Fault(
        19,
        "bit flip",
        "one bit of a rank's file of the newest checkpoint",
        storage.bit_flip,
        tests=("unit/test_corrupt_checkpoints.py",),
        fast=True,
    ),
    Fault(
        20,
        "missing rank shard",
        "of the newest checkpoint a rank's file is deleted",
        storage.missing,
        tests=("unit/test_corrupt_checkpoints.py",),
    ),
    Fault(
        21,
        "empty or foreign manifest",
        "the newest checkpoint's is emptied; it is replaced by the older one's",
        storage.foreign_manifest,
        tests=("unit/test_corrupt_checkpoints.py",),
    ),
    Fault(
        22,
        "reused step directory",
        "a whole checkpoint lies under the name of a later step",
        storage.reused_directory,
        tests=("unit/test_corrupt_checkpoints.py",),
    ),
    Fault(
        23,
        "storage 5xx, slow upload",
        "an S3 server behind a proxy that answers 503, cuts uploads, is slow or dead",
        tests=("integration/test_saving_to_s3.py", "integration/test_object_store.py"),
    ),
    Fault(
        24,
        "clock jump",
        "in the midst of a run the driver's clock jumps a day ahead, rank 0's a day back (Python's clocks)",
        launchers.clock_jump,
    ),
    Fault(
        25,
        "head or controller death",
        "SIGKILL of the driver at a step; of Ray's control store (`gcs_server`) under a run of Ray's workers",
        launchers.head_dies,
        tests=("integration/test_disturbed_run.py",),
    ),
    Fault(
        26, "raylet death", "SIGKILL of a node's raylet", nodes.raylet_dies, tests=("integration/test_many_nodes.py",)
    ),
    Fault(
        27,
        "drain notice",
        "a drain of a node in Ray, with a deadline",
        nodes.drain,
        tests=("integration/test_many_nodes.py",),
    ),
    Fault(
        28,
        "shrink",
        "a node of two is lost, and the run goes on with one worker",
        nodes.shrink,
        tests=("integration/test_many_nodes.py", "integration/test_resize.py"),
    ),
    Fault(
        29,
        "grow",
        "a node joins, and the run makes way for two workers",
        nodes.grow,
        tests=("integration/test_many_nodes.py", "integration/test_resize.py"),
    ),
    Fault(
        30,
        "below the minimum of workers",
        "of two nodes one is lost, cluster.workers.min is 2, and no other comes in time",
        nodes.below_minimum,
        tests=("integration/test_ray_job.py",),
    ),
    Fault(
        31,
        "zombie holding memory",
        "a worker fails, and a thread of it that does not end keeps the process",
        stuck.zombie,
    ),
    Fault(
        32,
        "CUDA out of memory",
        "torch.OutOfMemoryError raised in a worker at a step; no GPU",
        computing.gpu_out_of_memory,
    ),
    Fault(
        33,
        "host OOM kill",
        "SIGKILL of a worker, and the cgroup's oom_kill counted up (simulated)",
        computing.host_out_of_memory,
    ),
    Fault(34, "/dev/shm full", "a file system of one page there, filled", storage.shared_memory_full),
    Fault(
        35,
        "NaN on one rank",
        "a worker's loss is NaN at a step, once; training.on_nonfinite=rollback",
        computing.nan_on_one,
        tests=("integration/test_nonfinite.py",),
    ),
    Fault(
        36,
        "NaN on all ranks",
        "all workers' losses are NaN at a step, whenever it is done",
        computing.nan_on_all,
        tests=("integration/test_nonfinite.py",),
    ),
    Fault(37, "corrupt Arrow shard", "one bit of the training data's shard", inputs.corrupt_shard),
    Fault(38, "dataset changed since the checkpoint", "a record is added to the source", inputs.changed_dataset),
    Fault(39, "reader thread death", "the thread that reads shards ahead raises IndexError", inputs.reader_thread_dies),
    Fault(
        40,
        "straggler",
        "a worker's probe takes 40 times as long",
        stuck.straggler,
        tests=("integration/test_stragglers.py",),
    ),
    Fault(41, "crash loop", "an exception at the same step in every attempt", stuck.crash_loop),
    Fault(
        42,
        "second launcher on the same run",
        "the same command while the first one trains",
        launchers.second_launcher,
        fast=True,
        tests=("integration/test_second_launcher.py", "integration/test_claims_raced.py"),
    ),
    Fault(43, "metrics port taken", "another socket listens there", launchers.metrics_port_taken),
    Fault(
        44,
        "hostile checkpoint or model",
        "a base that is a pickle with a payload; one that comes with code; a signed manifest whose path leads out",
        inputs.hostile,
    ),
)
