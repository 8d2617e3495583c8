"""One process group of one rank for the whole session, and determinism switched on for those who ask."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from cluster.local_processes import free_port
from tests.support.gpu import DEVICE
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    if DEVICE is None:
        yield
        return
    from trainer.process_group import start_process_group

    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    # cuBLAS reads its setting once, before the first test that is not deterministic.
    os.environ.update(rank, MASTER_PORT=str(free_port()), CUBLAS_WORKSPACE_CONFIG=":4096:8")
    start_process_group()
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def deterministic() -> Iterator[None]:
    from trainer.deterministic import make_deterministic

    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model of grouped heads, 64 features each, which every attention kernel takes."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    path = save_tiny_model(tmp_path_factory.mktemp("base"), **sizes)
    return str(path)
