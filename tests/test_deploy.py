"""What `deploy/` names exists: metrics and labels, flags, routes; its files are well-formed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from mm_engine.cli.main import app as command_line
from mm_engine.server.app import ROUTES
from serving import FLAGS, ServerProcess

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana-dashboard.json"
DOCKERFILES = (DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda")
DRAIN_SECONDS = 30.0 + 5.0 + 5.0 + 3.0  # the drain, its errors, the engine's end, the last traces
#: Labels that Prometheus adds to what it scrapes, and its own metric.
ADDED = frozenset({"instance", "job"})
METRIC = re.compile(r"\b(?:mm_engine|process)_\w+|\bup\b")
GROUPED = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")

Metrics = dict[str, set[str]]


def scraped(text: str) -> Metrics:
    """The labels of each sample's name."""
    found: Metrics = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def faults_of(expression: str, metrics: Metrics) -> list[str]:
    """The names and labels in an expression of PromQL that no scrape has."""
    bare = re.sub(r'"[^"]*"', '""', expression)  # without the values of labels
    faults, labels = [], set[str]()
    for found in METRIC.finditer(re.sub(r"\{[^}]*\}", "", GROUPED.sub("", bare))):
        if found[0] in metrics:
            labels |= metrics[found[0]] | ADDED
        else:
            faults.append(found[0])
    for name, inside in re.findall(r"(\w+)\{([^}]*)\}", bare):
        used = set(re.findall(r"(\w+)\s*[=!]", inside))
        faults += [f"{name}{{{label}}}" for label in used - metrics.get(name, set()) - ADDED]
    for inside in GROUPED.findall(bare):
        faults += [label for label in re.findall(r"\w+", inside) if label not in labels]
    return faults


def dashboard_expressions() -> Iterator[str]:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
            assert asked is not None
            yield f"sum by ({asked[2]}) ({asked[1]})"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text("utf-8"))["groups"]
    return list(group["rules"])


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """All that a server shows that has answered."""
    with ServerProcess(tmp_path_factory.mktemp("deployed"), *FLAGS) as server:
        answer = server.http.post("/v1/completions", json={"prompt": "circle", "max_tokens": 3})
        assert answer.status_code == 200
        return scraped(server.http.get("/metrics").text)


def test_metrics_of_the_dashboard_exist_with_their_labels(scrape: Metrics) -> None:
    expressions = list(dashboard_expressions())
    assert len(expressions) > 20
    assert {text: faults for text in expressions if (faults := faults_of(text, scrape))} == {}


def test_metrics_of_the_alerts_exist_with_their_labels(scrape: Metrics) -> None:
    expressions = [rule["expr"] for rule in rules()]
    assert len(expressions) >= 6
    assert {text: faults for text in expressions if (faults := faults_of(text, scrape))} == {}


@pytest.mark.parametrize(
    ("expression", "faults"),
    [
        ("sum by (le) (rate(a_bucket[5m]))", []),
        ('mm_engine_up{instance="x"} == 0 or up{job="y"} == 0', []),
        ('sum by (le, instance) (rate(mm_engine_t_bucket{le="1"}[5m]))', []),
        ("rate(mm_engine_t[5m])", ["mm_engine_t"]),
        ('mm_engine_up{route="mm_engine_x"}', ["mm_engine_up{route}"]),
        ("sum by (le) (mm_engine_up)", ["le"]),
        ("sum by (route) (mm_engine_down)", ["mm_engine_down", "route"]),
    ],
)
def test_the_rule_about_expressions_itself(expression: str, faults: list[str]) -> None:
    known = {"up": set[str](), "mm_engine_up": set[str](), "mm_engine_t_bucket": {"le"}}
    found = faults_of(expression, known)
    assert found == (["le"] if "a_bucket" in expression else faults)


def test_every_metric_of_a_scrape_is_in_the_reference(scrape: Metrics) -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text("utf-8")
    told = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    ends = ("", "_bucket", "_count", "_sum")
    names = {name for name in scrape if name.startswith("mm_engine_")}
    names = {name for name in names if not name.endswith("_created")}
    assert names - {f"{name}{end}" for name in told for end in ends} == set()
    assert told - names - {name for name in told if f"{name}_bucket" in names} == set()


def test_the_operators_page_names_metrics_that_exist(scrape: Metrics) -> None:
    page = (ROOT / "docs" / "howto" / "observe.md").read_text("utf-8")
    told = set(re.findall(r"`(mm_engine_\w+?)_?`", page)) - {"mm_engine"}
    assert len(told) > 10
    assert {name for name in told if name not in scrape and f"{name}_bucket" not in scrape} == set()


def test_the_dashboard_leaves_the_data_source_open_and_panels_apart() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    variables = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource": "datasource", "instance": "query"}
    panels = dashboard["panels"]
    sources = [panel["datasource"] for panel in panels]
    sources += [target["datasource"] for panel in panels for target in panel["targets"]]
    assert {source["uid"] for source in sources} == {"${datasource}"}
    for name in ("id", "title"):
        assert len({panel[name] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert max(x for x, _ in cells) < 24 and not cells & taken
        taken |= cells


def test_alerts_say_how_bad_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
    assert len({rule["alert"] for rule in rules()}) == len(rules())


def options_of_serve() -> set[str]:
    group: Any = typer.main.get_command(command_line)
    return {option for given in group.commands["serve"].params for option in given.opts}


def manifest() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    return {document["kind"]: document for document in documents}


def container() -> dict[str, Any]:
    pod = manifest()["Deployment"]["spec"]["template"]["spec"]
    (found,) = pod["containers"]
    return dict(found)


def unit() -> list[tuple[str, str]]:
    lines = (DEPLOY / "mm-engine.service").read_text("utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if line and line[0] not in "#["]
    return [(name, value) for name, _, value in pairs]


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    pairs = [line.partition(" ") for line in lines if line.strip()]
    return [(name, value.strip()) for name, _, value in pairs]


def last(path: Path, name: str) -> str:
    return [value for found, value in instructions(path) if found == name][-1]


def test_commands_are_those_of_the_command_line() -> None:
    commands = [json.loads(last(path, "CMD")) for path in DOCKERFILES]
    commands.append(container()["args"])
    program, *words = shlex.split(dict(unit())["ExecStart"])
    assert program.endswith("/bin/engine")
    commands.append(words)
    group: Any = typer.main.get_command(command_line)
    command = group.commands["serve"]
    for first, *rest in commands:
        assert first == "serve"
        assert {word for word in rest if word.startswith("--")} <= options_of_serve()
        context = command.context_class(command, info_name="serve")
        _, left, _ = command.make_parser(context).parse_args(rest)  # raises what it can't take
        assert left == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_as_nobody_take_signals_and_are_checked(path: Path) -> None:
    found = instructions(path)
    assert [value for name, value in found if name == "FROM"] == [
        "python:${PYTHON} AS build",
        "python:${PYTHON}",
    ]
    user = last(path, "USER").partition(":")[0]
    assert user.isdecimal() and int(user) > 0
    assert json.loads(last(path, "ENTRYPOINT")) == ["engine"]  # no shell: SIGTERM reaches it
    assert json.loads(last(path, "CMD")) == ["serve", "--host", "0.0.0.0"]
    check = last(path, "HEALTHCHECK")
    (route,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", check)
    assert route in ROUTES
    sources = [word for name, value in found if name == "COPY" for word in value.split()[:-1]]
    assert {word for word in sources if not word.startswith(("-", "/opt"))} == {
        ".",
        "constraints.txt",
    }
    pips = [value for name, value in found if name == "RUN" and "pip install" in value]
    assert pips and all("-c constraints.txt" in value for value in pips)


def test_the_health_check_of_images_tells_a_server_from_none(tmp_path: Path) -> None:
    code = json.loads(last(DOCKERFILES[0], "HEALTHCHECK").partition("CMD ")[2])[2]
    with ServerProcess(tmp_path, *FLAGS) as server:
        there = code.replace("http://127.0.0.1:8000", server.url)
        assert there != code
        assert subprocess.run([sys.executable, "-c", there]).returncode == 0
    gone = subprocess.run([sys.executable, "-c", there], capture_output=True)
    assert gone.returncode != 0


def test_probes_ask_routes_that_exist() -> None:
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert set(paths.values()) - ROUTES == set()
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 600


def test_the_manifest_lets_the_server_drain_and_nothing_more() -> None:
    pod = manifest()["Deployment"]["spec"]["template"]["spec"]
    one = container()
    waits = float(one["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > waits + DRAIN_SECONDS
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    user = last(DOCKERFILES[0], "USER").partition(":")[0]
    assert str(pod["securityContext"]["runAsUser"]) == user
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # A Service's variables are named like ours.
    assert pod["enableServiceLinks"] is False
    (key,) = one["env"]
    assert key["name"] == "MM_ENGINE_API_KEY" and "secretKeyRef" in key["valueFrom"]
    assert one["resources"]["requests"] and one["resources"]["limits"]["memory"]


def test_parts_of_the_manifest_go_together() -> None:
    parts = manifest()
    assert set(parts) == {"PersistentVolumeClaim", "Deployment", "Service"}
    pod = parts["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    assert parts["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert parts["Service"]["spec"]["selector"].items() <= labels
    (port,) = container()["ports"]
    (served,) = parts["Service"]["spec"]["ports"]
    assert served["targetPort"] == port["name"] and port["containerPort"] == 8000
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == set(volumes)
    claim = volumes["cache"]["persistentVolumeClaim"]["claimName"]
    assert claim == parts["PersistentVolumeClaim"]["metadata"]["name"]
    paths = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert last(DOCKERFILES[0], "VOLUME") in paths and "/tmp" in paths


def test_the_unit_is_well_formed(tmp_path: Path) -> None:
    settings = dict(unit())
    assert settings["DynamicUser"] == "yes" and settings["Restart"] == "on-failure"
    assert settings["EnvironmentFile"].startswith("/")  # without a dash: it has to be there
    assert float(settings["TimeoutStopSec"].removesuffix("s")) > DRAIN_SECONDS
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze isn't installed")
    text = (DEPLOY / "mm-engine.service").read_text("utf-8")
    program = settings["ExecStart"].partition(" ")[0]
    here = str(Path(sys.executable).with_name("engine"))
    copy = tmp_path / "mm-engine.service"
    copy.write_text(text.replace(program, here))
    done = subprocess.run([verify, "verify", copy], capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if "mm-engine.service" in line]
    assert said == []
    copy.write_text(text.replace(program, here).replace("KillMode=mixed", "KillMood=mixed"))
    done = subprocess.run([verify, "verify", copy], capture_output=True, text=True, timeout=60)
    assert "KillMood" in done.stderr


def test_what_is_ignored_leaves_what_images_are_built_from() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for name in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "core", "kernels"):
        assert (ROOT / name).exists() and name not in ignored
    assert "plugins" not in ignored and ".git" in ignored
