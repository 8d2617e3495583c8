"""Memory that an export takes, by the size of the model: it should not grow with it.

Checkpoints of Llama-shaped models of the given fp32 sizes are written as four ranks would write them, without training.
Each is exported to bf16 by a process of its own. Told is by how much that process's resident set, files that it maps
included, was larger at its largest than after its imports, beside the largest tensor as it is exported.

    python benchmarks/export_memory.py --megabytes 250 1500 --vocab 32000 --folder DIR
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.storage import Storage
from tests.support.checkpoints import masters_of, random_values, trained_shapes, write_checkpoint
from tests.support.peak_memory import peak_growth
from tests.support.tiny import tiny_config
from trainer.checkpoint import read_manifest
from trainer.config import LoraConfig, ModelConfig
from trainer.export import ExportSource, export_adapter, export_full, export_merged
from trainer.tensor_files import TensorSpec, write_tensors

KINDS = ("model", "adapter", "merged")
RANKS = 4
HIDDEN, FFN = 1024, 4096
LORA = LoraConfig(rank=64)


def write_base(folder: Path, megabytes: int, vocab: int) -> dict[str, TensorSpec]:
    """A base in bf16 whose fp32 weights would have about this size. Returns its tensors."""
    per_layer = 3 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN  # keys and values have half the heads
    layers = max(1, round((megabytes * 1e6 / 4 - vocab * HIDDEN) / per_layer))
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": 16}
    config = tiny_config(tied=True, vocab_size=vocab, num_key_value_heads=8, **sizes)
    config.save_pretrained(folder)
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in trained_shapes(folder).items()}
    write_tensors(
        Storage.at(folder),
        "model.safetensors",
        specs,
        lambda name: torch.empty(specs[name].shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1),
    )
    return specs


def prepare(folder: Path, megabytes: int, vocab: int) -> dict[str, TensorSpec]:
    """A base, and a checkpoint of it for either method."""
    specs = write_base(folder / "base", megabytes, vocab)
    for name, lora in (("full", None), ("lora", LORA)):
        manifest = masters_of(trained_shapes(folder / "base", lora), RANKS)
        write_checkpoint(Storage.at(folder / name), manifest, random_values())
    return specs


def export(folder: Path, kind: str) -> None:
    checkpoints = Storage.at(folder / ("full" if kind == "model" else "lora"))
    base, target = folder / "base", Storage.at(folder / kind)
    source = ExportSource(
        checkpoints, read_manifest(checkpoints, *checkpoints.list()), base, ModelConfig(base=str(base))
    )
    match kind:
        case "model":
            export_full(source, target, torch.bfloat16)
        case "adapter":
            export_adapter(source, LORA, target)
        case "merged":
            export_merged(source, LORA, target, torch.bfloat16)


def export_one(folder: Path, kind: str) -> None:
    """In a process of its own: prints a line of JSON."""
    for module in ("peft", "transformers.models.llama.modeling_llama"):  # else they are imported while it exports
        importlib.import_module(module)
    started = time.perf_counter()
    before, grown = peak_growth(lambda: export(folder, kind))
    print(json.dumps({"before": before, "grown": grown, "seconds": time.perf_counter() - started}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[250, 1500], help="of fp32 weights")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000], help=f"rows of {HIDDEN} of the embedding")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, kind = options.one
        export_one(Path(folder), kind)
        return
    for megabytes in options.megabytes:
        for vocab in options.vocab:
            with tempfile.TemporaryDirectory(dir=options.folder) as temp:
                specs = prepare(Path(temp) / "model", megabytes, vocab)
                for kind in options.kinds:
                    print(f"{megabytes:6,} MB of fp32  {describe(Path(temp), kind, specs)}", flush=True)


def describe(temp: Path, kind: str, specs: dict[str, TensorSpec]) -> str:
    command = [sys.executable, __file__, "--one", str(temp / "model"), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    written = sum(path.stat().st_size for path in (temp / "model" / kind).iterdir())
    if kind == "adapter":
        largest = max(4 * LORA.rank * max(spec.shape) for name, spec in specs.items() if "_proj" in name)
    else:
        largest = max(spec.nbytes for spec in specs.values())
    megabytes = {name: value / 1e6 for name, value in {**found, "written": written, "largest": largest}.items()}
    return (
        f"{kind:7}  {megabytes['written']:7,.0f} MB written in {found['seconds']:5.1f} s  "
        f"largest tensor {megabytes['largest']:5,.0f} MB  "
        f"{megabytes['before']:4,.0f} MB before, at most {megabytes['grown']:5,.0f} MB more"
    )


if __name__ == "__main__":
    main()
