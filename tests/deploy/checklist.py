"""What no schema says of our manifests: one function an item, which yields what is wrong with the objects it is given.

Every one is held against every overlay and example, and against manifests that break it (`test_checklist.py`).
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence

from server.frontend.origin import hosts_for
from server.metrics import Metrics
from server.settings import PREFIX, Settings, SettingsError, is_loopback, read_settings
from tests.deploy.rendered import (
    ROOT,
    Object,
    containers,
    environment,
    labels,
    of_kind,
    pods,
    quantity,
    selects,
    server,
)

Check = Callable[[Sequence[Object]], Iterator[str]]
CHECKS: dict[str, Check] = {}

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
USER = 65532
NAME = {"app.kubernetes.io/name": "dvt-serve"}
LEFT_BEHIND_S = 10  # docs/settings.md: what hangs after the drain is left behind by then
OURS_TO_MAKE = {"Secret": {"dvt-serve-control"}, "PersistentVolumeClaim": {"dvt-serve-bundles"}}  # by who deploys
BUDGET = "dvt-serve-budget"


def item(check: Check) -> Check:
    CHECKS[check.__name__] = check
    return check


def settings(objects: Sequence[Object], container: Object) -> Settings:
    """As the server would read them. Raises SettingsError."""
    values = environment(objects, container)
    return read_settings(
        {
            name.removeprefix(PREFIX).lower(): value
            for name, value in values.items()
            if name.removeprefix(PREFIX).lower() in Settings.model_fields
        }
    )


def ours(selector: Object, deployment: Object) -> bool:
    """Of these pods, and of nobody else's: an empty selector is everybody's."""
    named = selector.get("matchLabels", selector)
    return NAME.items() <= named.items() and selects(selector, labels(deployment))


@item
def a_new_replica_is_ready_before_an_old_one_goes(objects: Sequence[Object]) -> Iterator[str]:
    for deployment, _ in pods(objects):
        strategy = deployment["spec"].get("strategy", {})
        rolling = strategy.get("rollingUpdate", {})
        if (rolling.get("maxUnavailable"), rolling.get("maxSurge")) not in ((0, 1), (1, 0)):  # the other: no-surge
            yield f"maxUnavailable and maxSurge are {rolling}"
        if strategy.get("type") != "RollingUpdate" or deployment["spec"].get("minReadySeconds", 0) < 1:
            yield "the new replica is not given time to become known"


@item
def three_probes_have_three_meanings(objects: Sequence[Object]) -> Iterator[str]:
    for _, pod in pods(objects):
        container = server(pod)
        values = settings(objects, container)
        if container.get("command") != ["dvt", "serve"] or is_loopback(values.host):
            yield f"{container.get('command')} listens on {values.host}"
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for kind, path in (("startup", "/readyz"), ("readiness", "/readyz"), ("liveness", "/livez")):
            probe = container.get(f"{kind}Probe", {})
            asked = probe.get("httpGet", {})
            if asked.get("path") != path or ports.get(asked.get("port")) != values.port:
                yield f"the {kind} probe asks {asked}"
            if probe.get("timeoutSeconds", 1) < 2:
                yield f"the {kind} probe gives up after a second, which a busy node takes"
        startup, liveness = container.get("startupProbe", {}), container.get("livenessProbe", {})
        if startup.get("failureThreshold", 3) * startup.get("periodSeconds", 10) < 60 + values.profile_seconds:
            yield "the start is given less than a minute"
        if liveness.get("failureThreshold", 3) * liveness.get("periodSeconds", 10) < 2 * values.stall_timeout_s:
            yield "a restart comes before a stall has had time to pass"
        allowed = hosts_for(values.host, values.allowed_hosts)
        if str(ipaddress.ip_address("10.1.2.3")) not in allowed:
            yield "probes ask by the pod's address, which DVT_ALLOWED_HOSTS does not let in"


@item
def stopping_takes_no_longer_than_it_is_given(objects: Sequence[Object]) -> Iterator[str]:
    for _, pod in pods(objects):
        container = server(pod)
        values = settings(objects, container)
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if sleep < 3:
            yield "there is no preStop sleep: clients are sent to a server that stops"
        if values.drain_delay_s < 1:
            yield "DVT_DRAIN_DELAY_S gives connections that are kept no notice"
        takes = sleep + values.drain_delay_s + values.drain_timeout_s + LEFT_BEHIND_S
        if pod.get("terminationGracePeriodSeconds", 30) < takes + 5:
            yield f"terminationGracePeriodSeconds is less than {takes:g} and a margin"


@item
def a_node_can_always_be_emptied_one_replica_at_a_time(objects: Sequence[Object]) -> Iterator[str]:
    for deployment, _ in pods(objects):
        if labels(deployment).get("dvt-serve/track") != "stable":
            continue
        budgets = [
            each["spec"]
            for each in of_kind(objects, "PodDisruptionBudget")
            if ours(each["spec"]["selector"], deployment)
            and "dvt-serve/track" in each["spec"]["selector"]["matchLabels"]
        ]
        if [(each.get("maxUnavailable"), each.get("minAvailable")) for each in budgets] != [(1, None)]:
            yield "there is no one PodDisruptionBudget with maxUnavailable 1"
        elif budgets[0].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield "a pod that does not start holds up its node"


@item
def replicas_are_spread_over_nodes_and_zones(objects: Sequence[Object]) -> Iterator[str]:
    for deployment, pod in pods(objects):
        spread = {each["topologyKey"]: each for each in pod.get("topologySpreadConstraints", [])}
        for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone"):
            rule = spread.get(key, {})
            if not ours(rule.get("labelSelector", {}), deployment):
                yield f"there is no spread over {key}"
            elif rule.get("matchLabelKeys") != ["pod-template-hash"]:
                yield f"{key}: an update's old replicas count among the new"


@item
def autoscaling_is_by_queueing_and_by_pressure(objects: Sequence[Object]) -> Iterator[str]:
    asked: list[str] = []
    scalers = of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    for each in scalers:
        spec = each["spec"]
        target = spec["scaleTargetRef"]
        (deployment,) = (one for one in of_kind(objects, "Deployment") if one["metadata"]["name"] == target["name"])
        if "replicas" in deployment["spec"]:
            yield "every apply sets the number of replicas back"
        if each["kind"] == "ScaledObject":
            asked += [trigger["metadata"]["query"] for trigger in spec["triggers"]]
            low, high, behavior = (
                spec["minReplicaCount"],
                spec["maxReplicaCount"],
                spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
            )
            for trigger in spec["triggers"]:
                if (trigger.get("type"), trigger.get("metricType")) != ("prometheus", "AverageValue"):
                    yield "the thresholds are for one replica"
                if not {"serverAddress", "threshold"} <= trigger["metadata"].keys():
                    yield "Prometheus is not named, or no threshold"
                if trigger["metadata"].get("ignoreNullValues") != "false":
                    yield "where Prometheus knows nothing, replicas are taken away"
                if set(re.findall('namespace="(.*?)"', trigger["metadata"]["query"])) != {
                    each["metadata"]["namespace"]
                }:
                    yield "it asks for another namespace"
            if spec.get("fallback", {}).get("behavior") != "currentReplicasIfHigher":
                yield "without Prometheus replicas are taken away"
        else:
            asked += [str(metric) for metric in spec["metrics"]]
            low, high, behavior = spec["minReplicas"], spec["maxReplicas"], spec["behavior"]
        if not 2 <= low < high:
            yield f"from {low} to {high} replicas"
        if behavior["scaleDown"]["stabilizationWindowSeconds"] < 300:
            yield "it scales down at once, and accuracy pays"
    if len(scalers) > 1:
        yield "two autoscalers steer one Deployment"
    if scalers:
        text = " ".join(asked)
        if "dvt_queue_seconds_sum" not in text and "dvt_images_waiting" not in text:
            yield "queueing plays no part"
        if "dvt_pressure" not in text and "dvt_load_over_capacity" not in text:
            yield "pressure plays no part: brownout hides the load"
        if re.search(r"gpu|dcgm|'Resource'", text, re.I):
            yield "it scales by how busy a device is"


@item
def only_who_is_named_gets_in_or_out(objects: Sequence[Object]) -> Iterator[str]:
    policies = [each["spec"] for each in of_kind(objects, "NetworkPolicy")]
    if not policies:  # a component
        return
    for deployment, pod in pods(objects):
        if not all(NAME.items() <= each["podSelector"].get("matchLabels", {}).items() for each in policies):
            yield "a policy is for pods that are not ours"
        these = [each for each in policies if selects(each["podSelector"], labels(deployment))]
        for way, rules in (("Ingress", "ingress"), ("Egress", "egress")):
            if not any(way in each["policyTypes"] and not each.get(rules) for each in these):
                yield f"{way} is not denied by default"
        ports = {port["name"] for port in server(pod)["ports"]}
        for rule in (rule for each in these if "Ingress" in each["policyTypes"] for rule in each.get("ingress", [])):
            if not rule.get("from") or not all(
                selector.get("matchLabels") for peer in rule["from"] for selector in peer.values()
            ):
                yield "anybody may come in"
            if not {port["port"] for port in rule.get("ports", [{"port": "any"}])} <= ports:
                yield "more than the server's port is open"
        let_in = str([each.get("ingress") for each in these])
        if "dvt-serve/client" not in let_in or "monitoring" not in let_in:
            yield "clients or Prometheus cannot come in"
        out = [rule for each in these if "Egress" in each["policyTypes"] for rule in each.get("egress", [])]
        if out and not pod.get("automountServiceAccountToken"):
            yield "there is a way out that nobody needs"
        if not out and pod.get("automountServiceAccountToken"):
            yield "the API server cannot be reached"
        if any(port.get("port") not in (443, 6443) for rule in out for port in rule.get("ports", [{}])):
            yield "there is a way out to other ports than the API server's"


@item
def pods_are_restricted(objects: Sequence[Object]) -> Iterator[str]:
    for namespace in of_kind(objects, "Namespace"):
        if namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce the restricted level"
    for _, pod in pods(objects):
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or {context.get("runAsUser"), context.get("runAsGroup")} != {USER}:
            yield f"it does not run as {USER}"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield "there is no seccomp profile"
        if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield "it shares a namespace with the node"
        if pod.get("enableServiceLinks") is not False:
            yield "a Service called dvt would set DVT_PORT"
        for container in containers(pod):
            context = container.get("securityContext", {})
            if context.get("privileged") is not False or context.get("allowPrivilegeEscalation") is not False:
                yield f"{container['name']} may become more than it is"
            if not context.get("readOnlyRootFilesystem"):
                yield f"{container['name']} may write to its root"
            if context.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{container['name']} has capabilities"
            if {"runAsUser", "runAsNonRoot", "seccompProfile", "procMount"} & context.keys():
                yield f"{container['name']} has a user or a profile of its own"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{container['name']} takes a port of the node"
        for volume in pod.get("volumes", []):
            kinds = volume.keys() - {"name"}
            if not kinds <= {"configMap", "emptyDir", "secret", "persistentVolumeClaim", "image"}:
                yield f"the volume {volume['name']} is a {', '.join(kinds)}"


@item
def only_a_fleet_has_a_token_and_it_opens_one_object(objects: Sequence[Object]) -> Iterator[str]:
    for _, pod in pods(objects):
        fleet = environment(objects, server(pod)).get("DVT_POLICY_STORE") == "configmap"
        if pod.get("automountServiceAccountToken") is not fleet:
            yield f"the token of the service account: {pod.get('automountServiceAccountToken')}"
    for account in of_kind(objects, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield "the service account hands its token to any pod"
    if of_kind(objects, "ClusterRole", "ClusterRoleBinding"):
        yield "rights over the whole cluster"
    for binding in of_kind(objects, "RoleBinding"):
        if [(each["kind"], each["name"]) for each in binding.get("subjects", [])] != [("ServiceAccount", "dvt-serve")]:
            yield f"{binding['metadata']['name']} binds {binding.get('subjects')}"
    for role in of_kind(objects, "Role"):
        if len(role["rules"]) != 1:
            yield "a role has one rule"
        for rule in role["rules"]:
            if rule["apiGroups"] != [""] or rule["resources"] != ["configmaps"]:
                yield f"rights on {rule['resources']}"
            if rule.get("resourceNames") != [BUDGET]:
                yield f"rights on objects called {rule.get('resourceNames', 'anything')}"
            if set(rule["verbs"]) != {"get", "list", "watch", "update"}:
                yield f"rights to {rule['verbs']}"


@item
def an_apply_leaves_the_live_budget_alone(objects: Sequence[Object]) -> Iterator[str]:
    for deployment, pod in pods(objects):
        values = environment(objects, server(pod))
        if values.get("DVT_POLICY_STORE") != "configmap" or labels(deployment)["dvt-serve/track"] == "canary":
            continue
        found = [each for each in of_kind(objects, "ConfigMap") if each["metadata"]["name"] == BUDGET]
        if values.get("DVT_POLICY_CONFIGMAP") != BUDGET or len(found) != 1:
            yield "the ConfigMap of the budget is not there"
        if any({"data", "binaryData", "immutable"} & each.keys() for each in found):
            yield "the manifest owns what the servers write"


@item
def memory_is_reserved_and_idle_cores_are_used(objects: Sequence[Object]) -> Iterator[str]:
    for _, pod in pods(objects):
        for container in containers(pod):
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            if not requests.get("memory") or requests["memory"] != limits.get("memory"):
                yield f"{container['name']}: memory {requests.get('memory')} of {limits.get('memory')}"
            if not requests.get("cpu") or "cpu" in limits:
                yield f"{container['name']}: cores {requests.get('cpu')} of {limits.get('cpu')}"
            if not limits.get("ephemeral-storage"):
                yield f"{container['name']} may fill the node's disk"
        container = server(pod)
        values = settings(objects, container)
        needed = values.max_held_bytes + values.decode_threads * values.max_pixels * 4 + 2**29
        memory = quantity(container.get("resources", {}).get("limits", {}).get("memory", "0"))
        if memory < needed:
            yield f"{memory / 2**30:.1f} GiB of memory where settings allow for {needed / 2**30:.1f}"


@item
def pools_are_as_large_as_the_cores_that_are_asked_for(objects: Sequence[Object]) -> Iterator[str]:
    for _, pod in pods(objects):
        container = server(pod)
        asked = {
            one["name"]: one["valueFrom"]["resourceFieldRef"]
            for one in container["env"]
            if "resourceFieldRef" in one.get("valueFrom", {})
        }
        on_cpu = environment(objects, container).get("DVT_ENGINE") == "onnx"
        for name in ("DVT_DECODE_THREADS", *(["DVT_EXECUTORS"] if on_cpu else [])):
            if asked.get(name) != {"containerName": container["name"], "resource": "requests.cpu"}:
                yield f"{name} does not follow from requests.cpu: without a limit it would be the node's cores"


@item
def who_needs_a_gpu_gets_one_and_goes_where_they_are(objects: Sequence[Object]) -> Iterator[str]:
    for _, pod in pods(objects):
        container = server(pod)
        if environment(objects, container).get("DVT_ENGINE") == "onnx":
            continue
        if container["resources"]["limits"].get("nvidia.com/gpu") != "1":
            yield "it has no GPU"
        where = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        if where not in pod.get("tolerations", []):
            yield "nodes that are kept for who needs a GPU do not take it"


@item
def engines_are_built_before_the_server_starts(objects: Sequence[Object]) -> Iterator[str]:
    for deployment, pod in pods(objects):
        container = server(pod)
        values = environment(objects, container)
        if values.get("DVT_ENGINE") != "tensorrt":
            continue
        builders = [each for each in pod.get("initContainers", []) if each["command"][:2] == ["dvt", "build"]]
        if len(builders) != 1:
            yield "nobody builds"
            continue
        (builder,) = builders
        theirs = environment(objects, builder)
        if builder["command"][2:] != ["$(DVT_BUNDLE)"] or theirs.get("DVT_BUNDLE") != values.get("DVT_BUNDLE"):
            yield "another bundle is built for than is served"
        if builder["image"] != container["image"]:
            yield "another release builds than serves"
        where = values.get("DVT_ENGINE_DIR")
        mounts = [
            {mount["mountPath"]: mount["name"] for mount in each["volumeMounts"]} for each in (builder, container)
        ]
        if not where or theirs.get("DVT_ENGINE_DIR") != where or mounts[0].get(where) != mounts[1].get(where):
            yield "the server does not look where the builder writes"
        if mounts[0].get("/bundle") != mounts[1].get("/bundle"):
            yield "the builder does not see the server's bundle"
        for each in (builder, container):
            if each["resources"]["limits"].get("nvidia.com/gpu") != "1":
                yield f"{each['name']} has no GPU of its own"
        if deployment["spec"].get("progressDeadlineSeconds", 600) < 1800:
            yield "a build takes longer than an update is given"
        if pod["securityContext"].get("fsGroupChangePolicy") != "OnRootMismatch":
            yield "every mount makes plans writable for a group, and they are refused"


@item
def images_are_of_one_named_version(objects: Sequence[Object]) -> Iterator[str]:
    for _, pod in pods(objects):
        images = [each["image"] for each in containers(pod)]
        images += [volume["image"]["reference"] for volume in pod.get("volumes", []) if "image" in volume]
        for image in images:
            name, _, tag = image.rpartition("/")[2].partition(":")
            if "@sha256:" not in image and not tag.startswith(VERSION):
                yield f"{name} has the tag {tag or 'latest'!r}, this is {VERSION}"
        if any(each.get("imagePullPolicy") != "IfNotPresent" for each in containers(pod)):
            yield "a node that has the image still needs the registry"


@item
def no_manifest_has_a_token_and_a_new_one_is_seen(objects: Sequence[Object]) -> Iterator[str]:
    if of_kind(objects, "Secret"):
        yield "a Secret is in the manifests"
    for _, pod in pods(objects):
        for container in containers(pod):
            for name, value in environment(objects, container).items():
                if re.search("token|password|secret", name, re.I) and not value.startswith("/"):
                    yield f"{name} is in the manifests"
            if any("secretRef" in source for source in container.get("envFrom", [])):
                yield "a secret in the environment is never rotated"
        container = server(pod)
        values = settings(objects, container)
        if values.control_token_file is None or values.open_control:
            yield "whoever reaches the server may change its budget"
            continue
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        mount = mounts.get(str(values.control_token_file.parent), {})
        (volume,) = (each for each in pod["volumes"] if each["name"] == mount.get("name")) if mount else ({},)
        if volume.get("secret", {}).get("secretName") != "dvt-serve-control" or not mount.get("readOnly"):
            yield "the token comes from elsewhere"
        elif volume["secret"].get("optional") or volume["secret"].get("defaultMode") != 0o440:
            yield "without the Secret the pod starts, or others may read it"
        if "subPath" in mount:
            yield "a subPath never sees a new token"


@item
def every_setting_is_one_and_can_be_used(objects: Sequence[Object]) -> Iterator[str]:
    for _, pod in pods(objects):
        for container in containers(pod):
            for name in environment(objects, container):
                if name.removeprefix(PREFIX).lower() not in Settings.model_fields:
                    yield f"there is no setting {name}"
            try:
                settings(objects, server(pod))
            except SettingsError as error:
                yield str(error)
                return


@item
def what_is_written_to_is_a_volume_with_a_bound(objects: Sequence[Object]) -> Iterator[str]:
    for _, pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        if pod["securityContext"].get("fsGroup") != USER:
            yield "volumes are not given to the pod's group"
        if any(len(volume) != 2 for volume in volumes.values()):
            yield "a volume is not said to be of one kind, and would be an empty one"
        if "DVT_STATE_DIR" not in environment(objects, server(pod)):
            yield "the budget is kept nowhere"
        for container in containers(pod):
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            if not mounts.keys() & {"/tmp"}:
                yield f"{container['name']} has no /tmp"
            values = environment(objects, container)
            for name in ("DVT_STATE_DIR", "DVT_ENGINE_DIR"):
                where = values.get(name)
                if where and (where not in mounts or mounts[where].get("readOnly")):
                    yield f"{container['name']} cannot write to {name}"
            bundle = values.get("DVT_BUNDLE", "")
            if "bundle" in volumes and not (bundle.startswith("/bundle") and mounts.get("/bundle", {}).get("readOnly")):
                yield f"{container['name']} has no bundle, or may write to it"
            sizes = [quantity(each["emptyDir"].get("sizeLimit", 0)) for each in volumes.values() if "emptyDir" in each]
            if not all(sizes) or sum(sizes) > quantity(container["resources"]["limits"]["ephemeral-storage"]):
                yield f"{container['name']}: volumes on the node's disk have no bound, or one above the container's"


@item
def everything_that_is_named_is_there(objects: Sequence[Object]) -> Iterator[str]:
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    canary = all(labels(deployment).get("dvt-serve/track") == "canary" for deployment, _ in pods(objects))
    named: list[tuple[str, str]] = []
    for _, pod in pods(objects):
        named += [] if canary else [("ServiceAccount", pod["serviceAccountName"])]  # the first one's
        for container in containers(pod):
            named += [("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])]
            named += [("volume", mount["name"]) for mount in container["volumeMounts"]]
        there |= {("volume", volume["name"]) for volume in pod["volumes"]}
        named += [("Secret", each["secret"]["secretName"]) for each in pod["volumes"] if "secret" in each]
        claims = [each["persistentVolumeClaim"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
        named += [] if canary else [("PersistentVolumeClaim", claim["claimName"]) for claim in claims]
    for binding in of_kind(objects, "RoleBinding"):
        named += [("Role", binding["roleRef"]["name"])]
        named += [(subject["kind"], subject["name"]) for subject in binding["subjects"]]
    for kind, name in named:
        if (kind, name) not in there and name not in OURS_TO_MAKE.get(kind, ()):
            yield f"there is no {kind} {name}"
    for claim in of_kind(objects, "PersistentVolumeClaim"):
        if not claim["spec"].get("accessModes") or "storage" not in claim["spec"]["resources"]["requests"]:
            yield f"the API server refuses the claim {claim['metadata']['name']}"
    for service in of_kind(objects, "Service"):
        if not any(ours(service["spec"]["selector"], deployment) for deployment, _ in pods(objects)):
            yield f"the Service {service['metadata']['name']} leads nowhere"
        for port in service["spec"]["ports"]:
            if not all(port["targetPort"] in [one["name"] for one in server(pod)["ports"]] for _, pod in pods(objects)):
                yield f"the Service {service['metadata']['name']} leads to no port"


@item
def versions_side_by_side_do_not_take_each_others_pods(objects: Sequence[Object]) -> Iterator[str]:
    for deployment, _ in pods(objects):
        selector = deployment["spec"]["selector"]
        if "dvt-serve/track" not in selector["matchLabels"] or not selects(selector, labels(deployment)):
            yield "a Deployment's selector does not name its track"
        if not NAME.items() <= labels(deployment).items():
            yield "the Service does not find the pods"
    for service in of_kind(objects, "Service"):
        if "dvt-serve/track" in service["spec"]["selector"] and not service["metadata"]["name"].endswith("-canary"):
            yield "a canary gets no share of the traffic"


def known_metrics() -> set[str]:
    """Every name that a query of Prometheus may have."""
    registry = Metrics(model="m", version="v", release="r", stage_gmacs=(1.0, 2.0)).registry
    suffixes = {"counter": ("_total",), "histogram": ("_sum", "_count", "_bucket"), "gauge": ("",), "summary": ("",)}
    return {family.name + end for family in registry.collect() for end in suffixes.get(family.type, ("",))}
