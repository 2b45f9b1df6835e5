"""Every overlay and example has every item of the checklist; and a manifest that breaks an item is found out."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.settings import PREFIX, Settings
from tests.deploy.checklist import CHECKS, known_metrics
from tests.deploy.rendered import KUBERNETES, Object, compose, environment, of_kind, pods, render, server

OLDEST, NEWEST = "1.30", "1.37"  # of Kubernetes, as docs/kubernetes.md says
ADAPTER = KUBERNETES / "components" / "autoscaling-hpa" / "prometheus-adapter.yaml"
# What Kubernetes itself has no schema for: resources of KEDA and of the Prometheus operator.
CUSTOM = {"ScaledObject", "PodMonitor", "PrometheusRule"}
# Components on what they are for: each of them, and those that no example has.
COMPOSED: dict[str, tuple[str, Sequence[str], str]] = {
    "hpa": ("overlays/cpu", ["autoscaling-hpa", "networkpolicy"], OLDEST),
    "no-surge": ("overlays/nvidia-gpu-torch", ["no-surge", "bundle-claim"], OLDEST),
    "bundle-image": ("overlays/nvidia-h100", ["bundle-image", "engine-cache"], "1.35"),
    "bundle-image-cpu": ("overlays/cpu", ["bundle-image", "fleet"], "1.35"),
    "canary-of-all": (
        "overlays/nvidia-l4",
        ["bundle-claim", "engine-cache", "fleet", "networkpolicy", "autoscaling-keda", "canary"],
        OLDEST,
    ),
}
FOLDERS = sorted(
    str(file.parent.relative_to(KUBERNETES))
    for kind in ("overlays", "examples")
    for file in KUBERNETES.glob(f"{kind}/*/kustomization.yaml")
)
ALL = [*FOLDERS, *COMPOSED]


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Object]]:
    """One of COMPOSED, written and rendered once."""
    root = tmp_path_factory.mktemp("composed")

    def objects(name: str) -> list[Object]:
        if (folder := root / name).exists():
            return render(folder)
        folder.mkdir()
        return compose(folder, *COMPOSED[name][:2])

    return objects


@pytest.fixture
def objects(request: pytest.FixtureRequest, composed: Callable[[str], list[Object]]) -> list[Object]:
    """What a folder, or one of COMPOSED, renders to."""
    return composed(request.param) if request.param in COMPOSED else render(KUBERNETES / request.param)


@pytest.mark.parametrize("objects", ALL, indirect=True)
@pytest.mark.parametrize("name", CHECKS)
def test_item(name: str, objects: list[Object]) -> None:
    assert list(CHECKS[name](objects)) == []


@pytest.mark.parametrize(
    ("objects", "oldest"), [(n, COMPOSED[n][2] if n in COMPOSED else OLDEST) for n in ALL], indirect=["objects"]
)
def test_the_api_server_of_every_supported_version_takes_it(objects: list[Object], oldest: str) -> None:
    for version in (oldest, NEWEST):
        for each in objects:
            if each["kind"] not in CUSTOM:
                takes(json.dumps(each), version)


@functools.cache  # most objects are in most renderings
def takes(document: str, version: str) -> None:
    assert kubernetes_validate.validate(json.loads(document), version, strict=True) == version


def test_a_field_that_the_oldest_does_not_have_is_found_out(tmp_path: Path) -> None:
    objects = compose(tmp_path, "overlays/cpu", ["bundle-image"])
    (deployment,) = of_kind(objects, "Deployment")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, OLDEST, strict=True)


def test_every_component_is_in_an_example_or_tried_here() -> None:
    named = " ".join((KUBERNETES / folder / "kustomization.yaml").read_text() for folder in FOLDERS)
    named = re.sub("^ *#.*", "", named, flags=re.M)
    used = set(re.findall(r"components/([a-z-]+)", named)) | {c for _, of, _ in COMPOSED.values() for c in of}
    assert used >= {file.parent.name for file in KUBERNETES.glob("components/*/kustomization.yaml")}


def test_a_small_example_takes_ten_lines_and_is_the_documentations() -> None:
    text = (KUBERNETES / "examples" / "small" / "kustomization.yaml").read_text()
    assert len(text.splitlines()) <= 10
    assert text in (KUBERNETES.parents[1] / "docs" / "kubernetes.md").read_text()


def test_the_full_example_shows_every_setting() -> None:
    objects = render(KUBERNETES / "examples" / "full")
    ((_, pod),) = pods(objects)
    assert environment(objects, server(pod)).keys() >= {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}


def test_the_full_example_names_every_overlay_and_component() -> None:
    text = (KUBERNETES / "examples" / "full" / "kustomization.yaml").read_text()
    for folder in (*KUBERNETES.glob("overlays/*"), *KUBERNETES.glob("components/*")):
        if folder.name not in ("gpu", "tensorrt", "canary"):  # parts of overlays, and examples/canary
            assert re.search(rf"\b{folder.name}\b", text), folder


def test_a_setting_wins_over_those_of_the_components_that_are_taken_with_it(tmp_path: Path) -> None:
    """A component is applied after the generators of who takes it: what it merges into the settings would win."""
    mine = "configMapGenerator: [{name: dvt-serve-settings, behavior: merge, literals: [DVT_BUNDLE=/bundle/2]}]"
    components = ["bundle-claim", "engine-cache", "fleet", "networkpolicy", "no-surge", "autoscaling-hpa"]
    objects = compose(tmp_path, "overlays/nvidia-gpu", components, mine)
    ((_, pod),) = pods(objects)
    for container in (server(pod), *pod["initContainers"]):
        assert environment(objects, container)["DVT_BUNDLE"] == "/bundle/2"


def test_another_setting_is_another_version_of_the_pods(tmp_path: Path) -> None:
    names = set()
    for number in (1, 2):
        (folder := tmp_path / str(number)).mkdir()
        mine = f"configMapGenerator: [{{name: dvt-serve-settings, behavior: merge, literals: [DVT_TOP_K={number}]}}]"
        ((_, pod),) = pods(compose(folder, "overlays/cpu", [], mine))
        names.add(server(pod)["envFrom"][0]["configMapRef"]["name"])
    assert len(names) == 2


def test_a_canary_stands_beside_what_it_is_made_of_and_leaves_it_as_it_is() -> None:
    """Applied, one after the other, into one namespace."""
    first, canary = (render(KUBERNETES / "examples" / name) for name in ("small", "canary"))

    def named(objects: list[Object]) -> dict[tuple[str, str], Object]:
        return {(each["kind"], each["metadata"]["name"]): each for each in objects}

    shared = named(first).keys() & named(canary).keys()
    assert all(named(first)[key] == named(canary)[key] for key in shared)
    assert {kind for kind, _ in shared} <= {"ConfigMap"}
    ((stable, _),), ((other, pod),) = pods(first), pods(canary)
    assert stable["spec"]["selector"] != other["spec"]["selector"]
    (service,) = of_kind(first, "Service")
    for deployment in (stable, other):
        assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    (alone,) = of_kind(canary, "Service")
    assert alone["spec"]["selector"]["dvt-serve/track"] == "canary"
    assert server(pod)["image"] != server(next(pods(first))[1])["image"]


def test_every_metric_that_autoscaling_asks_for_exists() -> None:
    made = {name for name in queries() if name.startswith("dvt_")}
    assert len(queries()) == 4
    for query in queries().values():
        asked = set(re.findall(r"dvt_[a-z_]+", query))
        assert asked
        assert asked <= known_metrics()
    for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]:
        assert rule["seriesQuery"].partition("{")[0] in known_metrics()
    hpa = yaml.safe_load((ADAPTER.parent / "horizontalpodautoscaler.yaml").read_text())
    assert {metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]} == made


def queries() -> dict[str, str]:
    """What autoscaling asks Prometheus, by trigger or metric; prometheus-adapter's as it fills them in."""
    text = (KUBERNETES / "components" / "autoscaling-keda" / "scaledobject.yaml").read_text()
    asked = {trigger["name"]: trigger["metadata"]["query"] for trigger in yaml.safe_load(text)["spec"]["triggers"]}
    for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]:
        query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="dvt-serve",pod=~"a|b"')
        asked[rule["name"]["as"]] = query.replace("<<.GroupBy>>", "pod")
    return asked


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool: no query was evaluated")
@pytest.mark.parametrize(
    ("pressures", "wanted", "each"),
    [
        ((0.0, 0.0), 0, {"a": 0, "b": 0}),  # the queue alone decides
        ((0.5, 0.0), 3, {"a": 2, "b": 1}),
        ((0.5, 0.5), 4, {"a": 2, "b": 2}),
        ((0.04, 0.04), 0, {"a": 0, "b": 0}),  # not worth a replica
        ((0.99, 0.99), 8, {"a": 4, "b": 4}),  # no more than four times as many at once
    ],
)
def test_as_many_replicas_are_asked_for_as_would_serve_at_the_targets_cost(
    tmp_path: Path, pressures: tuple[float, float], wanted: int, each: dict[str, int]
) -> None:
    asked = queries()
    waiting = {"a": 3, "b": 1}  # images, on the average
    series = [
        {"series": f'{name}{{namespace="dvt-serve",pod="{pod}"}}', "values": values}
        for pod, pressure in zip("ab", pressures, strict=True)
        for name, values in (
            ("dvt_pressure", f"{pressure}x40"),
            ("dvt_queue_seconds_sum", f"0+{15 * waiting[pod]}x40"),
        )
    ]
    expected = {
        asked["images-waiting"]: {"{}": 4},
        asked["dvt_images_waiting"]: {f'{{pod="{pod}"}}': number for pod, number in waiting.items()},
        asked["budget-pressure"]: {"{}": wanted},
        asked["dvt_load_over_capacity"]: {f'{{pod="{pod}"}}': number for pod, number in each.items()},
    }
    tests = [
        {
            "expr": query,
            "eval_time": "5m",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
        }
        for query, samples in expected.items()
    ]
    document = {
        "evaluation_interval": "1m",
        "tests": [{"interval": "15s", "input_series": series, "promql_expr_test": tests}],
    }
    (file := tmp_path / "test.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# A manifest that breaks an item, and the item that says so: at least one for each.

Break = Callable[[Any], object]


def at(objects: list[Object], kind: str, path: str) -> Any:
    kind, _, name = kind.partition("/")
    found = next(each for each in of_kind(objects, kind) if name in ("", each["metadata"]["name"]))
    for part in path.split(".") if path else []:
        found = found[int(part) if part.isdigit() else part]  # type: ignore[assignment,call-overload,index]
    return found


def of(pod: Any, kind: str) -> Any:
    """The first volume of a kind."""
    return next(volume[kind] for volume in pod["volumes"] if kind in volume)


def without(name: str) -> Break:
    """A container whose environment lacks what has this in its name."""
    return lambda container: container.update(env=[one for one in container["env"] if name not in one["name"]])


POD = "spec.template.spec"
SERVER = f"{POD}.containers.0"
BUILDER = f"{POD}.initContainers.0"
DENY, CLAIM = "NetworkPolicy/dvt-serve", "PersistentVolumeClaim/dvt-serve"
BROKEN: list[tuple[str, str, str, Break]] = [
    ("a_new_replica_is_ready", "Deployment", "spec.strategy.rollingUpdate", lambda x: x.update(maxUnavailable=1)),
    ("a_new_replica_is_ready", "Deployment", "spec", lambda x: x.pop("strategy")),
    ("a_new_replica_is_ready", "Deployment", "spec", lambda x: x.pop("minReadySeconds")),
    ("three_probes", "Deployment", SERVER, lambda x: x.pop("startupProbe")),
    ("three_probes", "Deployment", SERVER, lambda x: x.pop("readinessProbe")),
    ("three_probes", "Deployment", f"{SERVER}.livenessProbe.httpGet", lambda x: x.update(path="/readyz")),
    ("three_probes", "Deployment", f"{SERVER}.livenessProbe", lambda x: x.update(periodSeconds=1)),
    ("three_probes", "Deployment", f"{SERVER}.startupProbe", lambda x: x.update(failureThreshold=3)),
    ("three_probes", "Deployment", f"{SERVER}.readinessProbe", lambda x: x.pop("timeoutSeconds")),
    ("three_probes", "Deployment", f"{SERVER}.ports.0", lambda x: x.update(containerPort=9)),
    ("three_probes", "settings", "", lambda x: x.update(DVT_ALLOWED_HOSTS="dvt.example.org")),
    ("three_probes", "settings", "", lambda x: x.pop("DVT_HOST")),
    ("three_probes", "Deployment", SERVER, lambda x: x.pop("command")),
    ("stopping_takes", "Deployment", POD, lambda x: x.update(terminationGracePeriodSeconds=50)),
    ("stopping_takes", "Deployment", POD, lambda x: x.pop("terminationGracePeriodSeconds")),
    ("stopping_takes", "Deployment", SERVER, lambda x: x.pop("lifecycle")),
    ("stopping_takes", "settings", "", lambda x: x.update(DVT_DRAIN_TIMEOUT_S="60")),
    ("stopping_takes", "settings", "", lambda x: x.pop("DVT_DRAIN_DELAY_S")),
    ("a_node_can_always", "PodDisruptionBudget", "spec", lambda x: x.update(maxUnavailable=0)),
    ("a_node_can_always", "PodDisruptionBudget", "spec.selector.matchLabels", lambda x: x.update(app="else")),
    ("a_node_can_always", "PodDisruptionBudget", "spec.selector.matchLabels", lambda x: x.clear()),
    ("a_node_can_always", "PodDisruptionBudget", "spec", lambda x: x.pop("unhealthyPodEvictionPolicy")),
    ("replicas_are_spread", "Deployment", POD, lambda x: x.pop("topologySpreadConstraints")),
    ("replicas_are_spread", "Deployment", f"{POD}.topologySpreadConstraints", lambda x: x.pop()),
    ("replicas_are_spread", "Deployment", f"{POD}.topologySpreadConstraints.0", lambda x: x.pop("matchLabelKeys")),
    ("autoscaling_is_by", "ScaledObject", "spec.triggers", lambda x: x.pop(0)),
    ("autoscaling_is_by", "ScaledObject", "spec.triggers", lambda x: x.pop(1)),
    ("autoscaling_is_by", "ScaledObject", "spec.triggers.0.metadata", lambda x: x.update(query="DCGM_FI_DEV_GPU_UTIL")),
    ("autoscaling_is_by", "ScaledObject", "spec", lambda x: x.update(minReplicaCount=0)),
    ("autoscaling_is_by", "ScaledObject", "spec", lambda x: x.pop("fallback")),
    ("autoscaling_is_by", "ScaledObject", "spec.triggers.1.metadata", lambda x: x.pop("threshold")),
    ("autoscaling_is_by", "ScaledObject", "spec.triggers.0.metadata", lambda x: x.pop("ignoreNullValues")),
    ("autoscaling_is_by", "ScaledObject", "metadata", lambda x: x.update(namespace="other")),
    ("autoscaling_is_by", "Deployment", "spec", lambda x: x.update(replicas=2)),
    ("only_who_is_named", f"{DENY}-default-deny", "spec", lambda x: x.update(ingress=[{}])),
    ("only_who_is_named", f"{DENY}-default-deny", "spec", lambda x: x.update(egress=[{}])),
    ("only_who_is_named", f"{DENY}-default-deny", "spec", lambda x: x.update(policyTypes=["Ingress"])),
    ("only_who_is_named", f"{DENY}-default-deny", "spec.podSelector.matchLabels", lambda x: x.update(app="else")),
    ("only_who_is_named", f"{DENY}-clients", "spec.ingress.0.from.0", lambda x: x.update(podSelector={})),
    ("only_who_is_named", f"{DENY}-clients", "spec.ingress.0", lambda x: x.pop("from")),
    ("only_who_is_named", f"{DENY}-clients", "spec.ingress.0", lambda x: x.pop("ports")),
    ("only_who_is_named", f"{DENY}-clients", "spec", lambda x: x.pop("ingress")),
    ("only_who_is_named", f"{DENY}-default-deny", "spec", lambda x: x.update(podSelector={})),
    ("only_who_is_named", f"{DENY}-api-server", "spec", lambda x: x.update(policyTypes=["Ingress"])),
    ("only_who_is_named", f"{DENY}-api-server", "spec.egress.0", lambda x: x.pop("ports")),
    ("only_who_is_named", "Deployment", POD, lambda x: x.update(automountServiceAccountToken=False)),
    ("pods_are_restricted", "Deployment", f"{SERVER}.securityContext", lambda x: x.update(privileged=True)),
    ("pods_are_restricted", "Deployment", f"{BUILDER}.securityContext", lambda x: x.update(privileged=True)),
    ("pods_are_restricted", "Deployment", f"{SERVER}.securityContext", lambda x: x.pop("allowPrivilegeEscalation")),
    ("pods_are_restricted", "Deployment", f"{SERVER}.securityContext", lambda x: x.pop("readOnlyRootFilesystem")),
    ("pods_are_restricted", "Deployment", f"{SERVER}.securityContext", lambda x: x.pop("capabilities")),
    ("pods_are_restricted", "Deployment", f"{BUILDER}", lambda x: x.pop("securityContext")),
    ("pods_are_restricted", "Deployment", f"{SERVER}.securityContext", lambda x: x.update(runAsUser=0)),
    ("pods_are_restricted", "Deployment", f"{SERVER}.ports.0", lambda x: x.update(hostPort=8000)),
    ("pods_are_restricted", "Deployment", f"{POD}.securityContext", lambda x: x.update(runAsUser=0)),
    ("pods_are_restricted", "Deployment", f"{POD}.securityContext", lambda x: x.pop("seccompProfile")),
    ("pods_are_restricted", "Deployment", f"{POD}.securityContext", lambda x: x.pop("runAsNonRoot")),
    ("pods_are_restricted", "Deployment", POD, lambda x: x.update(hostNetwork=True)),
    ("pods_are_restricted", "Deployment", POD, lambda x: x.pop("enableServiceLinks")),
    ("pods_are_restricted", "Deployment", f"{POD}.volumes", lambda x: x[0].update(hostPath={"path": "/"})),
    ("pods_are_restricted", "Namespace", "metadata", lambda x: x.pop("labels")),
    ("only_a_fleet", "ServiceAccount", "", lambda x: x.pop("automountServiceAccountToken")),
    ("only_a_fleet", "Deployment", POD, lambda x: x.update(automountServiceAccountToken=False)),
    ("only_a_fleet", "Deployment", SERVER, without("POLICY")),
    ("only_a_fleet", "Role", "rules.0", lambda x: x.pop("resourceNames")),
    ("only_a_fleet", "Role", "rules.0", lambda x: x.update(resources=["secrets"])),
    ("only_a_fleet", "Role", "rules", lambda x: x.clear()),
    ("only_a_fleet", "RoleBinding", "subjects", lambda x: x.clear()),
    ("only_a_fleet", "RoleBinding", "subjects.0", lambda x: x.update(name="default")),
    ("only_a_fleet", "Role", "rules.0.verbs", lambda x: x.append("delete")),
    ("only_a_fleet", "Role", "", lambda x: x.update(kind="ClusterRole")),
    ("an_apply_leaves", "budget", "", lambda x: x.update(data={})),
    ("an_apply_leaves", "budget", "metadata", lambda x: x.update(name="other")),
    ("memory_is_reserved", "Deployment", f"{SERVER}.resources.limits", lambda x: x.update(memory="14Gi")),
    ("memory_is_reserved", "Deployment", f"{SERVER}.resources.limits", lambda x: x.update(cpu="4")),
    ("memory_is_reserved", "Deployment", f"{SERVER}.resources.limits", lambda x: x.pop("ephemeral-storage")),
    ("memory_is_reserved", "Deployment", f"{BUILDER}.resources.requests", lambda x: x.pop("memory")),
    ("memory_is_reserved", "settings", "", lambda x: x.update(DVT_MAX_HELD_BYTES=str(2**34))),
    ("pools_are", "Deployment", SERVER, without("DECODE")),
    ("pools_are", "settings", "", lambda x: x.update(DVT_ENGINE="onnx")),
    ("who_needs_a_gpu", "Deployment", f"{SERVER}.resources.limits", lambda x: x.pop("nvidia.com/gpu")),
    ("who_needs_a_gpu", "Deployment", POD, lambda x: x.pop("tolerations")),
    ("engines_are_built", "Deployment", POD, lambda x: x.pop("initContainers")),
    ("engines_are_built", "Deployment", BUILDER, lambda x: x.update(command=["dvt", "build", "/other"])),
    ("engines_are_built", "Deployment", BUILDER, lambda x: x.update(image="dvt-serve:0.0.9")),
    ("engines_are_built", "Deployment", f"{BUILDER}.env.0", lambda x: x.update(value="/elsewhere")),
    ("engines_are_built", "Deployment", BUILDER, lambda x: x["envFrom"].pop()),
    ("engines_are_built", "Deployment", f"{BUILDER}.resources.limits", lambda x: x.pop("nvidia.com/gpu")),
    ("engines_are_built", "Deployment", "spec", lambda x: x.update(progressDeadlineSeconds=600)),
    ("engines_are_built", "Deployment", f"{POD}.securityContext", lambda x: x.pop("fsGroupChangePolicy")),
    ("images_are", "Deployment", SERVER, lambda x: x.update(image="registry:5000/dvt-serve")),
    ("images_are", "Deployment", SERVER, lambda x: x.update(image="dvt-serve:latest")),
    ("images_are", "Deployment", BUILDER, lambda x: x.update(image="dvt-serve:latest")),
    ("images_are", "Deployment", SERVER, lambda x: x.update(imagePullPolicy="Always")),
    ("no_manifest_has_a_token", "ServiceAccount", "", lambda x: x.update(kind="Secret")),
    ("no_manifest_has_a_token", "settings", "", lambda x: x.update(DVT_CONTROL_TOKEN="abc")),
    ("no_manifest_has_a_token", "settings", "", lambda x: x.update(DVT_OPEN_CONTROL="true")),
    ("no_manifest_has_a_token", "Deployment", SERVER, lambda x: [m.update(subPath="token") for m in x["volumeMounts"]]),
    ("no_manifest_has_a_token", "Deployment", POD, lambda x: of(x, "secret").update(optional=True)),
    ("no_manifest_has_a_token", "Deployment", f"{SERVER}.envFrom", lambda x: x.append({"secretRef": {"name": "s"}})),
    ("every_setting_is_one", "settings", "", lambda x: x.update(DVT_TOPK="5")),
    ("every_setting_is_one", "settings", "", lambda x: x.update(DVT_TOP_K="0")),
    ("every_setting_is_one", "settings", "", lambda x: x.update(DVT_TIMEOUT_MS="99999")),
    ("what_is_written_to", "Deployment", f"{SERVER}.volumeMounts", lambda x: x.clear()),
    ("what_is_written_to", "Deployment", f"{BUILDER}.volumeMounts", lambda x: x.clear()),
    ("what_is_written_to", "Deployment", SERVER, lambda x: [m.pop("readOnly", 0) for m in x["volumeMounts"]]),
    ("what_is_written_to", "Deployment", POD, lambda x: of(x, "emptyDir").clear()),
    ("everything_that_is_named", "Deployment", POD, lambda x: x.update(serviceAccountName="other")),
    ("everything_that_is_named", f"{CLAIM}-engines", "metadata", lambda x: x.update(name="other")),
    ("what_is_written_to", "Deployment", f"{POD}.securityContext", lambda x: x.pop("fsGroup")),
    ("what_is_written_to", "Deployment", POD, lambda x: x["volumes"][0].pop("persistentVolumeClaim")),
    ("what_is_written_to", "Deployment", SERVER, without("STATE")),
    ("everything_that_is_named", f"{CLAIM}-engines", "spec", lambda x: x.pop("accessModes")),
    ("everything_that_is_named", "Service", "spec.selector", lambda x: x.clear()),
    ("everything_that_is_named", "RoleBinding", "roleRef", lambda x: x.update(name="other")),
    ("everything_that_is_named", "Service", "spec", lambda x: x.update(selector={"app": "else"})),
    ("everything_that_is_named", "Service", "spec.ports.0", lambda x: x.update(targetPort="grpc")),
    ("everything_that_is_named", "Deployment", POD, lambda x: x["volumes"].pop()),
    ("versions_side_by_side", "Deployment", "spec.selector.matchLabels", lambda x: x.pop("dvt-serve/track")),
    ("versions_side_by_side", "Deployment", "spec.template.metadata.labels", lambda x: x.pop("dvt-serve/track")),
    ("versions_side_by_side", "Service", "spec.selector", lambda x: x.update({"dvt-serve/track": "stable"})),
]  # fmt: skip


def item(beginning: str) -> str:
    (found,) = (name for name in CHECKS if name.startswith(beginning))
    return found


@pytest.mark.parametrize(("beginning", "kind", "path", "change"), BROKEN)
def test_a_manifest_that_breaks_an_item_is_found_out(beginning: str, kind: str, path: str, change: Break) -> None:
    objects = render(KUBERNETES / "examples" / "full")
    maps = of_kind(objects, "ConfigMap")
    match kind:
        case "settings":
            (settings,) = (each["data"] for each in maps if "-settings-" in each["metadata"]["name"])
            change(settings)
        case "budget":
            (budget,) = (each for each in maps if each["metadata"]["name"] == "dvt-serve-budget")
            change(budget if not path else budget[path])
        case _:
            change(at(objects, kind, path))
    assert list(CHECKS[item(beginning)](objects))


def test_every_item_is_broken_by_some_manifest() -> None:
    assert {item(beginning) for beginning, *_ in BROKEN} == set(CHECKS)
