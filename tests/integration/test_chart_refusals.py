"""Values that the chart refuses, with a message that names the key: what KubeRay would refuse after apply, and what
would lose work, hang or be open to everybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.helm import CHART, template

SINGLE_GPU = CHART / "ci" / "single-gpu-lora-values.yaml"

NO_SHUTDOWN = {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0, "suspend": False}


def _rules(*rules: tuple[str, str, int], **job: Any) -> dict[str, Any]:
    made = [{"policy": p, "condition": {"jobStatus": s, "ttlSeconds": t}} for p, s, t in rules]
    return {"job": NO_SHUTDOWN | {"deletionRules": made} | job}


MOUNTED = {
    "config": {"run": {"storage": "/nfs/runs"}},
    "extraVolumes": [{"name": "nfs", "nfs": {"server": "files", "path": "/"}}],
    "extraVolumeMounts": [{"name": "nfs", "mountPath": "/nfs"}],
}
REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    # What KubeRay would refuse after apply.
    ("name too long", {"fullnameOverride": "n" * 48}, ("fullnameOverride", "47")),
    ("name begins with a digit", {"fullnameOverride": "7b"}, ("fullnameOverride", "letter")),
    ("suspend", {"job": NO_SHUTDOWN | {"suspend": True}}, ("job.suspend", "job.shutdownAfterJobFinishes")),
    ("ttl", {"job": NO_SHUTDOWN | {"ttlSecondsAfterFinished": 60}}, ("job.ttlSecondsAfterFinished",)),
    ("interactive mode", {"job": {"submissionMode": "InteractiveMode"}}, ("job.submissionMode", "HTTPMode")),
    ("negative backoff", {"job": {"backoffLimit": -1}}, ("job.backoffLimit",)),
    ("no deadline", {"job": {"activeDeadlineSeconds": 0}}, ("job.activeDeadlineSeconds",)),
    ("old Ray", {"rayVersion": "2.51.2"}, ("auth.mode", "rayVersion", "2.52")),
    (
        "deletion rules and shutdown",
        _rules(("DeleteSelf", "FAILED", 0), shutdownAfterJobFinishes=True),
        ("job.deletionRules", "job.shutdownAfterJobFinishes"),
    ),
    ("same rule twice", _rules(("DeleteSelf", "FAILED", 0), ("DeleteSelf", "FAILED", 5)), ("job.deletionRules[1]",)),
    ("rules in the wrong order", _rules(("DeleteCluster", "FAILED", 9), ("DeleteSelf", "FAILED", 5)), ("DeleteSelf",)),
    ("autoscaler by environment", {"head": {"env": [{"name": "RAY_enable_autoscaler_v2"}]}}, ("head.env.0.name",)),
    ("label of a Service", {"head": {"podLabels": {"app.kubernetes.io/name": "x"}}}, ("head.podLabels",)),
    # What would lose work, hang or be open to everybody.
    ("no storage", {"storage": {"persistentVolumeClaim": {"existingClaim": ""}}}, ("storage.uri", "job.backoffLimit")),
    ("two storages", {"storage": {"uri": "s3://b/r"}, "config": {"run": {"storage": "s3://b/x"}}}, ("storage.uri",)),
    ("storage in the pod", {"config": {"run": {"storage": "/tmp/runs"}}}, ("config.run.storage", "/storage")),
    (
        "storage in an emptyDir",
        MOUNTED | {"extraVolumes": [{"name": "nfs", "emptyDir": {}}]},
        ("config.run.storage", "/nfs"),
    ),
    ("relative storage", {"config": {"run": {"storage": "runs"}}}, ("config.run.storage",)),
    (
        "claim of one node",
        {"storage": {"persistentVolumeClaim": {"existingClaim": "", "create": True, "accessModes": ["ReadWriteOnce"]}}},
        ("accessModes", "ReadWriteMany"),
    ),
    ("open to all", {"auth": {"mode": "disabled"}, "networkPolicy": {"enabled": False}}, ("auth.mode", "CVE")),
    ("queue without a name", {"queue": {"kind": "kueue"}}, ("queue.name",)),
    ("workers", {"config": {"cluster": {"num_workers": 2}}}, ("config.cluster.num_workers", "worker.replicas")),
    ("bounds", {"config": {"cluster": {"workers": {"max": 3}}}}, ("config.cluster.workers.max=3", "worker.replicas")),
    ("no GPU asked for", {"config": {"cluster": {"use_gpu": False}}}, ("config.cluster.use_gpu", "worker.gpusPerPod")),
    ("GPUs of a node", {"config": {"cluster": {"gpus_per_node": 8}}}, ("config.cluster.gpus_per_node", "gpusPerPod")),
    ("launcher", {"config": {"cluster": {"launcher": "processes"}}}, ("config.cluster.launcher",)),
    ("too few CPUs", {"config": {"cluster": {"cpus_per_worker": 17}}}, ("worker.resources.limits.cpu",)),
    ("shared memory", {"worker": {"shmSize": "129Gi"}}, ("worker.shmSize", "worker.resources.limits.memory")),
    ("GPUs twice", {"worker": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, ("worker.gpusPerPod",)),
    ("Ray's port", {"config": {"metrics": {"port": 8080}}}, ("config.metrics.port",)),
    # Typos and types, of the chart and of the run's configuration.
    ("unknown key", {"workers": {}}, ("workers",)),
    ("unknown nested key", {"worker": {"replica": 2}}, ("worker", "replica")),
    ("string for integer", {"worker": {"gpusPerPod": "8"}}, ("worker.gpusPerPod",)),
    ("unknown key of the run", {"config": {"optimzer": {}}}, ("config", "optimzer")),
    ("type in the run", {"config": {"training": {"global_batch": "many"}}}, ("config.training.global_batch",)),
    ("a run without a model", {"config": {"model": None}}, ("config.model", "object")),
]


@pytest.mark.parametrize(("what", "values", "named"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused(what: str, values: dict[str, Any], named: tuple[str, ...], tmp_path: Path) -> None:
    """Each is one change away from values that are fine."""
    done = template(tmp_path, SINGLE_GPU, values)
    assert done.returncode != 0, "it was rendered"
    assert all(word in done.stderr for word in named), done.stderr


def test_everything_refused_has_an_accepted_neighbour(tmp_path: Path) -> None:
    """So that the refusals above are for what they say."""
    for values in (
        {"fullnameOverride": "n" * 47},
        {"job": NO_SHUTDOWN},
        _rules(("DeleteCluster", "FAILED", 5), ("DeleteSelf", "FAILED", 9)),
        {"rayVersion": "2.52.0"},
        {"config": {"run": {"storage": "/storage/elsewhere"}}},
        {"config": {"run": {"storage": "s3://b/r"}}, "storage": {"persistentVolumeClaim": {"existingClaim": ""}}},
        MOUNTED | {"storage": {"persistentVolumeClaim": {"existingClaim": ""}}},
        {"auth": {"mode": "disabled"}},
        {"config": {"cluster": {"num_workers": 1, "use_gpu": True, "cpus_per_worker": 16}}},
        {"config": {"cluster": {"workers": {"min": 1, "max": 1}}}},
        {"config": {"cluster": {"use_gpu": None}}},
        {"worker": {"shmSize": "128Gi"}},
        {"queue": {"kind": "volcano", "name": "q"}},
        {"job": {"submissionMode": "SidecarMode"}},
    ):
        done = template(tmp_path, SINGLE_GPU, {"job": {"suspend": False}}, values)
        assert done.returncode == 0, f"{values}: {done.stderr}"
