"""The Helm chart: what it renders is valid to the letter, what KubeRay would refuse is refused before, and the pieces
that can run here do run: the dry run of `helm test` and the preStop hook. No API server is involved."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft7Validator

from helm.config_in_values_schema import VALUES, schema_text
from launch.config import Config, load_config
from tests.integration.conftest import Workshop
from tests.support.command import ROOT, Command, RunFiles, run, write_config
from tests.support.crd import CustomResource
from tests.support.helm import CHART, KUBERNETES, of_kind, render, run_helm

CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
SINGLE_GPU, FULL = CHART / "ci" / "single-gpu-lora-values.yaml", CHART / "ci" / "h100-8x8-full-values.yaml"
PRESETS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
SCHEMA_FILES = {
    "RayJob": "kuberay-1.7.0-rayjobs.yaml",
    "PodMonitor": "prometheus-operator-0.93.0-podmonitors.yaml",
    "PrometheusRule": "prometheus-operator-0.93.0-prometheusrules.yaml",
}
Change = Callable[[dict[str, Any]], Any]


@cache
def custom_resource(kind: str) -> CustomResource:
    shared = os.environ.get("BATON_SHARED")
    if shared is None:
        pytest.skip("BATON_SHARED is not set, so the custom resource definitions are not here")
    return CustomResource(Path(shared) / "schemas" / SCHEMA_FILES[kind])


def core_problems(value: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(value, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error)]
    return []


def problems(value: dict[str, Any]) -> list[str]:
    if value["kind"] in SCHEMA_FILES:
        return custom_resource(value["kind"]).problems(value)
    return core_problems(value)


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every pod that comes of it, by role, as a Pod."""
    spec = of_kind(objects, "RayJob")["spec"]
    cluster = spec["rayClusterSpec"]
    templates = {"head": cluster["headGroupSpec"]["template"], "worker": cluster["workerGroupSpecs"][0]["template"]}
    if "submitterPodTemplate" in spec:
        templates["submitter"] = spec["submitterPodTemplate"]
    made = {role: {"apiVersion": "v1", "kind": "Pod", **part} for role, part in templates.items()}
    return made | {"dry-run": of_kind(objects, "Pod")}


def config_of(objects: list[dict[str, Any]], folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_text(of_kind(objects, "ConfigMap", "-config")["data"]["config.yaml"])
    return load_config(str(path))


def changed(value: dict[str, Any], change: Change) -> dict[str, Any]:
    value = copy.deepcopy(value)
    change(value)
    return value


@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)
def test_lint(values: Path) -> None:
    done = run_helm("lint", "--strict", CHART, "-f", values)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)
def test_core_objects_and_pods_are_valid(values: Path, tmp_path: Path) -> None:
    objects = render(tmp_path, values)
    for value in [*(o for o in objects if o["kind"] not in SCHEMA_FILES), *pods(objects).values()]:
        assert not core_problems(value), value["metadata"]


@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)
def test_custom_resources_are_valid(values: Path, tmp_path: Path) -> None:
    custom = [o for o in render(tmp_path, values) if o["kind"] in SCHEMA_FILES]
    assert [o["kind"] for o in custom] == (list(SCHEMA_FILES)[1:] if values == FULL else []) + ["RayJob"]
    for value in custom:
        assert not problems(value), value["kind"]


def _head(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]


MUTATIONS: list[tuple[str, str, Change, str]] = [
    ("RayJob", "typo", lambda o: o["spec"].update(backofLimit=3), "backofLimit"),
    ("RayJob", "string for integer", lambda o: o["spec"].update(backoffLimit="3"), "backoffLimit"),
    ("RayJob", "beyond int32", lambda o: o["spec"].update(ttlSecondsAfterFinished=2**31), "ttlSecondsAfterFinished"),
    ("RayJob", "bad nested key", lambda o: _head(o).update(resorces={}), "resorces"),
    ("RayJob", "nested string for integer", lambda o: _head(o)["ports"][0].update(containerPort="1"), "containerPort"),
    ("RayJob", "missing", lambda o: o["spec"]["rayClusterSpec"]["headGroupSpec"].pop("template"), "template"),
    ("RayJob", "not in enum", lambda o: o["spec"]["rayClusterSpec"]["authOptions"].update(mode="on"), "mode"),
    ("RayJob", "CEL on a value", lambda o: o["spec"].update(managedBy="me"), "managedBy"),
    (
        "RayJob",
        "CEL on two fields",
        lambda o: o["spec"].update(
            deletionStrategy={
                "onSuccess": {"policy": "DeleteSelf"},
                "onFailure": {"policy": "DeleteSelf"},
                "deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}],
            }
        ),
        "cannot be used together",
    ),
    (
        "RayJob",
        "CEL deep inside",
        lambda o: o["spec"].update(deletionStrategy={"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]}),
        "requires either the JobStatus",
    ),
    ("PodMonitor", "typo", lambda o: o["spec"]["podMetricsEndpoints"][0].update(intervall="1s"), "intervall"),
    ("PodMonitor", "pattern", lambda o: o["spec"]["podMetricsEndpoints"][0].update(interval="15 s"), "interval"),
    ("PrometheusRule", "list", lambda o: o["spec"]["groups"][0]["rules"][0].update(expr=["up"]), "expr"),
    ("NetworkPolicy", "typo", lambda o: o["spec"].update(policyType=["Ingress"]), "policyType"),
    ("PodDisruptionBudget", "type", lambda o: o["spec"].update(minAvailable=[1]), "minAvailable"),
]


@pytest.mark.parametrize(("kind", "what", "change", "named"), MUTATIONS, ids=[f"{m[0]}-{m[1]}" for m in MUTATIONS])
def test_the_validators_reject(
    kind: str, what: str, change: Change, named: str, full_objects: list[dict[str, Any]]
) -> None:
    value = of_kind(full_objects, kind, "-head" if kind in ("NetworkPolicy", "PodDisruptionBudget") else "")
    assert not problems(value)
    found = problems(changed(value, change))
    assert found and named in " ".join(found), found


@pytest.fixture(scope="module")
def full_objects(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return render(tmp_path_factory.mktemp("full"), FULL)


def test_dashboard_and_rules_arrive_unchanged(full_objects: list[dict[str, Any]]) -> None:
    dashboard = (CHART / "files" / "dashboard.json").read_text()
    carried = of_kind(full_objects, "ConfigMap", "-dashboard")
    assert json.loads(carried["data"]["baton.json"]) == json.loads(dashboard)
    assert carried["metadata"]["labels"]["grafana_dashboard"] == "1"
    rules = (CHART / "files" / "alerts.yaml").read_text()
    assert of_kind(full_objects, "PrometheusRule")["spec"] == yaml.safe_load(rules)
    assert "{{" in rules and "{{" in dashboard, "templating of Prometheus and Grafana must have been there to survive"


def test_config_in_the_config_map_loads(full_objects: list[dict[str, Any]], tmp_path: Path) -> None:
    config = config_of(full_objects, tmp_path)
    assert (config.run.name, config.run.storage) == ("demo", "s3://example-runs/runs")
    assert (config.cluster.num_workers, config.cluster.use_gpu, config.cluster.cpus_per_worker) == (64, True, 8)
    # Helm holds numbers as floats, and its YAML would write these as 5e+08, 3e+09 and 1e-05.
    assert (config.zero.reduce_bucket_size, config.zero.max_live_parameters) == (500_000_000, 3_000_000_000)
    assert config.optimizer.lr == 1e-5


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_values(preset: Path, tmp_path: Path) -> None:
    """A preset can stand under `config:`; where runs lie and how workers are started is the chart's."""
    config = yaml.safe_load(preset.read_text())
    config.pop("run", None)
    cluster = config.get("cluster", {})
    cluster.pop("launcher", None)
    workers, gpus = cluster.pop("num_workers", 1), cluster.get("gpus_per_node", 0)
    limits = {"cpu": "96", "memory": "2000Gi"}
    worker = {"gpusPerPod": gpus, "replicas": workers // (gpus or 1), "resources": {"limits": limits}}
    values = {
        "config": config,
        "worker": worker,
        "image": {"repository": "registry.example.com/baton"},
        "storage": {"uri": "gs://example/runs"},
    }
    loaded = config_of(render(tmp_path, values), tmp_path)
    expected = Config.model_validate(config)
    assert (loaded.model, loaded.data, loaded.training) == (expected.model, expected.data, expected.training)
    assert (loaded.cluster.num_workers, loaded.cluster.use_gpu) == (workers, gpus > 0)


def test_values_schema_holds_the_configuration_schema() -> None:
    assert VALUES.read_text() == schema_text(), "run `make schema`"
    Draft7Validator.check_schema(json.loads(VALUES.read_text()))


@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)
def test_pods_are_restricted_and_know_no_api(values: Path, tmp_path: Path) -> None:
    """The restricted Pod Security Standard; IPC_LOCK only where it was asked for."""
    for role, pod in pods(render(tmp_path, values)).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["capabilities"]["drop"] == ["ALL"]
            assert ("add" in security["capabilities"]) == (role == "worker" and values == FULL)


def test_time_to_save(full_objects: list[dict[str, Any]]) -> None:
    """Kubernetes waits longer than the hook, the drain and Ray's job stop do."""
    made = pods(full_objects)
    head = made["head"]["spec"]["containers"][0]
    worker = made["worker"]["spec"]["containers"][0]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "900"} in head["env"]
    assert {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "900"} in worker["env"]
    assert head["lifecycle"]["preStop"]["exec"]["command"][2] == "900"
    assert all(made[role]["spec"]["terminationGracePeriodSeconds"] == 1020 for role in ("head", "worker"))


def test_notes(tmp_path: Path) -> None:
    """`helm template` leaves NOTES.txt out, so a copy of the chart shows it in an object."""
    chart = shutil.copytree(CHART, tmp_path / "chart")
    (chart / "templates" / "NOTES.txt").rename(chart / "files" / "notes.txt")
    head = "apiVersion: v1\nkind: Secret\nmetadata: {name: notes}\n"
    (chart / "templates" / "shown.yaml").write_text(
        head + 'text: {{ tpl (.Files.Get "files/notes.txt") . | toJson }}\n'
    )
    text = of_kind(render(tmp_path, SINGLE_GPU, chart=chart), "Secret")["text"]
    assert "The run demo: 1 workers, in /storage/runs." in text and "It is suspended now" in text


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in values.items():
        inner = _keys(value, f"{prefix}{name}.") if isinstance(value, dict) and value else []
        keys += inner or [f"{prefix}{name}"]
    return keys


def test_the_table_of_values_is_whole() -> None:
    table = (CHART / "README.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    listed = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}

    def covered(key: str) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in listed)

    missing = [key for key in _keys(values) if not covered(key)]
    unknown = [name for name in listed if not any(k == name or k.startswith(f"{name}.") for k in _keys(values))]
    assert not missing and not unknown, f"missing in README.md: {missing}; not in values.yaml: {unknown}"


def test_the_dry_run_of_helm_test(workshop: Workshop, tmp_path: Path) -> None:
    """The pod's own command, with the chart's config.yaml, run here."""
    values = {
        "config": workshop.values | {"cluster": {}, "run": {}},
        "image": {"repository": "registry.example.com/baton"},
        "storage": {"persistentVolumeClaim": {"existingClaim": "shared"}},
    }
    objects = render(tmp_path, values)
    written = yaml.safe_load(of_kind(objects, "ConfigMap", "-config")["data"]["config.yaml"])
    written["run"]["storage"] = str(tmp_path / "runs")  # where the claim would be mounted
    path = write_config(tmp_path, written)
    python, script, flag, _, *rest = of_kind(objects, "Pod")["spec"]["containers"][0]["command"]
    assert (python, script, flag) == ("python", "/opt/baton/launch/finetune.py", "--config")
    done = run("finetune", "--config", str(path), *rest)
    assert done.process.returncode == 0 and "dry run: nothing was started" in done.output, done.output
    assert not (tmp_path / "runs" / "demo" / "run.json").exists()


def test_pre_stop_saves_before_the_pod_ends(workshop: Workshop, tmp_path: Path) -> None:
    """The hook finds the driver by its command line and returns when that has saved; its 75 makes the Ray job FAILED,
    which KubeRay tries again."""
    objects = render(tmp_path, SINGLE_GPU)
    job = of_kind(objects, "RayJob")
    bash, _, seconds, script = _head(job)["lifecycle"]["preStop"]["exec"]["command"]
    assert bash == "bash" and job["spec"]["entrypoint"] == f"python {script} --config /etc/baton/config.yaml"
    hook = tmp_path / "stop-driver.sh"
    hook.write_text(of_kind(objects, "ConfigMap", "-config")["data"]["stop-driver.sh"])
    tree = tmp_path / "tree"  # a path of its own: the hook must not find other drivers of this machine
    tree.symlink_to(ROOT)
    values = workshop.values | {"run": {"storage": str(tmp_path / "runs")}}
    values["training"] = values["training"] | {"steps": 5000}
    values["cluster"] = {"launcher": "processes", "num_workers": 1}
    driver = Command("finetune", "--config", str(write_config(tmp_path, values)), tree=tree, cwd=ROOT)
    try:
        driver.wait_for(r"step 2/5000")
        command = ["bash", str(hook), seconds, str(tree / "launch" / "finetune.py")]
        stopped = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert stopped.returncode == 0 and driver.finish(10) == 75, stopped.stderr + driver.output
    finally:
        driver.kill()
    result = RunFiles(tmp_path / "runs" / "run").result
    assert result["status"] == "stopped" and result["checkpoint"] and result["step"] >= 2
    again = subprocess.run(command, timeout=10, check=False)
    assert again.returncode == 0, "with no driver there is nothing to wait for"
