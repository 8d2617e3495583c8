"""Data and models that are not what they were, or not what they seem."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

from data_shards.reading.shard_reader import SplitReader
from launch.exit_codes import ExitCode
from tests.faults import storage
from tests.faults.bench import EVERY, Bench, Fired, Result, rank, steps_done
from tests.faults.processes import survives
from tests.faults.storage import CUT_AT


def corrupt_shard(bench: Bench) -> Result:
    """One bit of the dataset that training reads."""
    trial = bench.trial("corrupt-shard")
    prepared = trial.folder / "prepared"
    shutil.copytree(bench.root / "prepared", prepared)
    elsewhere = [f"data.prepared={prepared}"]
    assert trial.give(arguments=[*elsewhere, f"training.steps={CUT_AT}"]) == ExitCode.DONE, trial.log
    shard = max((path for path in prepared.rglob("*.arrow") if "train" in str(path)), key=lambda p: p.stat().st_size)
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 1
    shard.write_bytes(contents)
    assert trial.give(arguments=elsewhere) == ExitCode.FAILED, trial.log
    reason = trial.files.result["reason"]
    assert shard.name in reason and "To prepare the dataset anew, delete" in reason, reason
    shutil.rmtree(shard.parents[len(shard.relative_to(prepared).parts) - 2])
    began = time.time()
    assert trial.give(arguments=elsewhere) == ExitCode.DONE, trial.log
    result = trial.survived(Fired(CUT_AT, began, 0), "")
    return Result(
        "stops with exit code 1: “… {shard}: … To prepare the dataset anew, delete …”; done, and given again, the same "
        "end, bit for bit".replace("{shard}", shard.name),
        result.lost_steps,
        result.recovery_s,
    )


def changed_dataset(bench: Bench) -> Result:
    """One more record."""
    trial = bench.trial("changed-data")
    train = trial.folder / "train.jsonl"
    shutil.copy(bench.root / "train.jsonl", train)
    mine = [f"data.train={train}"]
    assert trial.give(arguments=[*mine, f"training.steps={CUT_AT}"]) == ExitCode.DONE, trial.log
    before = train.read_bytes()
    train.write_bytes(before + json.dumps({"question": "And one more?", "answer": "One more."}).encode() + b"\n")
    assert trial.give(arguments=mine) == ExitCode.BAD_INPUT
    said = "was started with something else that matters"
    assert said in trial.log and "fingerprint" in trial.log, trial.log
    train.write_bytes(before)
    began = time.time()
    assert trial.give(arguments=mine) == ExitCode.DONE, trial.log
    result = trial.survived(Fired(CUT_AT, began, 0), "")
    return Result(
        f"refused with exit code 2: “the run … {said}: … fingerprint …”; with the old data, the same end, bit for bit",
        result.lost_steps,
        result.recovery_s,
    )


def reader_thread_dies(bench: Bench) -> Result:
    """It is asked for rows of a shard that there is not."""
    trial = bench.trial("reader")
    mark = trial.mark()

    def install() -> None:
        prefetch = SplitReader.prefetch

        def disturbed(self: SplitReader, rows: Any) -> None:
            # Rows are asked for four steps ahead, and before the step is counted.
            if rank() == 1 and steps_done() == EVERY + 1 and mark.fire(EVERY + 2):
                self._ahead.add([(10**6, 0)])
            prefetch(self, rows)

        SplitReader.prefetch = disturbed  # type: ignore[method-assign]

    return survives(trial, install, said="the thread that reads shards ahead died: IndexError")


class _Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self._proof,)


def hostile(bench: Bench) -> Result:
    """A base that is a pickle, one that comes with code, and a manifest that points out of its folder."""
    trial = bench.trial("hostile")
    proof = trial.folder / "was-executed"
    pickled = trial.folder / "pickled"
    shutil.copytree(bench.root / "base", pickled, ignore=shutil.ignore_patterns("*.safetensors*"))
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(_Harmful(proof)))
    assert trial.give(arguments=[f"model.base={pickled}"]) == ExitCode.BAD_INPUT, trial.log
    assert "only pickled weights (pytorch_model.bin), which can execute code" in trial.log
    coded = trial.folder / "coded"
    shutil.copytree(bench.root / "base", coded)
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "harmful", "auto_map": {"AutoConfig": "harmful.C", "AutoModelForCausalLM": "harmful.M"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "harmful.py").write_text(f"from pathlib import Path\nPath({str(proof)!r}).touch()\n")
    assert trial.give(arguments=[f"model.base={coded}", "run.name=coded"]) == ExitCode.BAD_INPUT, trial.log
    assert "contains custom code" in trial.log and "model.trust_remote_code=true" in trial.log, trial.log
    assert not proof.exists(), "something of them was executed"
    result = storage.path_traversal(bench)
    return Result(
        "pickled weights, and a model that comes with code: refused with exit code 2, and nothing of either ran; a "
        f"manifest that points outside: {result.outcome}",
        result.lost_steps,
        result.recovery_s,
    )
