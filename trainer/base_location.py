"""Where a base model's files are on this machine. Nothing here imports torch: a probe of a node should be quick."""

from __future__ import annotations

from pathlib import Path

import xxhash

from trainer.config import ModelConfig
from trainer.errors import ModelError

_SKETCHED_BYTES = 64 << 10


def locate_base(config: ModelConfig) -> Path:
    """The base as a local directory, downloaded if it is a hub id.

    Raises:
        ModelError: not found, gated, without safetensors, or without a config.
    """
    path = Path(config.base).expanduser()
    if path.is_dir():
        check_base_directory(path, needs_weights=not config.random_init)
        return path
    if path.is_absolute() or config.base.startswith((".", "~")) or config.base.count("/") != 1:
        raise ModelError(
            f"model.base={config.base!r}: no such directory. Give a directory that holds config.json and "
            "*.safetensors, or a hub id such as Qwen/Qwen2.5-7B."
        )
    return _download(config)


def _download(config: ModelConfig) -> Path:
    """One download a node: the hub's cache locks its files, so workers of a node wait for the first."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.jinja", "*.txt", "*.py" if config.trust_remote_code else "*.json"]
    patterns += [] if config.random_init else ["*.safetensors"]
    try:
        path = Path(huggingface_hub.snapshot_download(config.base, revision=config.revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"model.base={config.base!r} is gated: accept its licence on its hub page with your account, then set "
            "HF_TOKEN in the environment of the machines (on Kubernetes from a secret; not in a Ray job's runtime_env, "
            f"which the Jobs API shows to all). The hub said: {error}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = (
            "the hub refused it (401/403: HF_TOKEN missing or without access)"
            if status in (401, 403)
            else "no such directory here, and the hub could not be asked"
        )
        raise ModelError(
            f"model.base={config.base!r}: {hint}. Check the name, the network, or give a local directory. ({error})"
        ) from error
    check_base_directory(path, needs_weights=not config.random_init)
    return path


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def check_base_directory(path: Path, *, needs_weights: bool) -> None:
    """Refuse a directory that we could not or must not load, saying why."""
    if not (path / "config.json").is_file():
        raise ModelError(f"model.base={str(path)!r} has no config.json; it is not a transformers model directory.")
    if not needs_weights:
        return
    if not weight_files(path):
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only pickled weights ({', '.join(pickled[:3])}), which can execute code" if pickled else "no weights"
        raise ModelError(
            f"model.base={str(path)!r} has {found}. Baton reads safetensors only: convert with "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…), or set model.random_init=true."
        )


def sketch_of(path: Path, config: ModelConfig) -> str:
    """A hash of the sizes of config.json and the weights and of each file's first and last bytes: it tells bases on
    different machines apart without reading them. The names of tensors and their shapes are among the first bytes."""
    hasher = xxhash.xxh3_128()
    for file in [path / "config.json", *([] if config.random_init else weight_files(path))]:
        size = file.stat().st_size
        hasher.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            hasher.update(opened.read(_SKETCHED_BYTES))
            opened.seek(max(0, size - _SKETCHED_BYTES))
            hasher.update(opened.read())
    return hasher.hexdigest()
