"""Writes the tables of other programs' metrics (penstock/observe/tables) from their sources.

    python tools/foreign_metrics.py vllm SITE_PACKAGES VERSION
    python tools/foreign_metrics.py kube CHECKOUT VERSION           kube-state-metrics' docs/metrics
    python tools/foreign_metrics.py dcgm CSV... VERSION             dcgm-exporter's etc/*.csv
    python tools/foreign_metrics.py container MARKDOWN VERSION      cAdvisor's docs/storage/prometheus.md
    python tools/foreign_metrics.py keda GO_FILE VERSION            KEDA's pkg/metricscollector/prommetrics.go
    python tools/foreign_metrics.py aibrix CHECKOUT VERSION         AIBrix' declarations in Go
    python tools/foreign_metrics.py node|prometheus PAGE VERSION    what such a program answers at /metrics

VERSION goes into the table's first line as it is: name the version, and the commit where there is one. The
sources themselves are not kept here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from penstock.observe import foreign

TABLES = Path(__file__).parent.parent / "penstock" / "observe" / "tables"
Row = tuple[str, str, tuple[str, ...]]
"""Name as it is declared (counters without `_total` where the library adds it), kind, labels."""

_BASE = ("model_name", "engine")


def vllm(root: Path) -> Iterator[Row]:
    """All declarations in vLLM's sources. `*`: it has labels that only a running one could tell."""
    texts = [path.read_text("utf-8") for path in sorted((root / "vllm").rglob("*.py"))]
    trees = [ast.parse(text) for text in texts if "vllm:" in text or "Metadata(" in text]
    of = [_constants(tree) for tree in trees]
    everywhere = {name: value for each in of for name, value in each.items() if "." in name}
    for tree, own in zip(trees, of, strict=True):
        names = {**everywhere, **own}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield from _declared(node, names)
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    yield from _offloading(key, value, names)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                yield from _offloading(node.targets[0].slice, node.value, names)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "counter_specs":
                for name, _ in ast.literal_eval(node.value):
                    yield name, "counter", _BASE


def _offloading(key: ast.AST | None, value: ast.AST, names: dict[str, str]) -> Iterator[Row]:
    name = None if key is None else _text(key, names)
    if name and name.startswith("vllm:") and isinstance(value, ast.Call):
        kind = re.search(r"Offloading(\w+)Metadata", ast.unparse(value.func))
        if kind:
            yield name, kind[1].lower(), (*_BASE, "*")


def _constants(tree: ast.AST) -> dict[str, str]:
    found = {}
    for node in ast.walk(tree):
        for each in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant):
                found[f"{node.name}.{ast.unparse(each.targets[0])}"] = str(each.value.value)  # type: ignore[attr-defined]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found.setdefault(ast.unparse(node.targets[0]), str(node.value.value))
    return found


def _text(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return names.get(ast.unparse(node))


def _declared(node: ast.Call, names: dict[str, str]) -> Iterator[Row]:
    kind = re.search(r"(counter|gauge|histogram)(_cls)?$", ast.unparse(node.func).lower())
    given = {each.arg: each.value for each in node.keywords}
    name = given.get("name") or (node.args[0] if node.args else None)
    text = None if name is None else _text(name, names)
    if kind is None or text is None or not text.startswith("vllm:"):
        return
    labels = given.get("labelnames") or (node.args[2] if len(node.args) > 2 else None)
    written = "" if labels is None else ast.unparse(labels)
    base = _BASE if "labelnames" in written else ()
    more = ("*",) if re.search(r"[A-Z]{3}|keys\(|metric_labelnames|self\.labelname_", written) else ()
    yield text, kind[1], (*base, *re.findall(r"'(\w+)'", written), *more)


def kube(root: Path) -> Iterator[Row]:
    """The Markdown tables of kube-state-metrics."""
    for path in sorted((root / "docs" / "metrics").rglob("*-metrics.md")):
        for line in path.read_text("utf-8").splitlines():
            cells = [cell.strip() for cell in line.split("|")]
            name = cells[1].strip("`") if len(cells) > 3 else ""
            if re.fullmatch(r"kube_\w+", name) and cells[2].lower() in ("gauge", "counter"):
                yield name, cells[2].lower(), tuple(dict.fromkeys(_star(re.findall(r"`(\w+)`=", line))))


def _star(labels: list[str]) -> Iterator[str]:
    for label in labels:  # `label_POD_LABEL` stands for whatever labels are let through
        yield "*" if re.search(r"[A-Z]{3}", label) else label


def dcgm(*paths: Path) -> Iterator[Row]:
    """The exporter's own lists, with what is commented out there: whoever wants them switches them on."""
    labels = ("gpu", "UUID", "device", "modelName", "Hostname", "GPU_I_PROFILE", "GPU_I_ID", "pci_bus_id")
    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            cells = [cell.strip() for cell in line.lstrip("# ").split(",")]
            if len(cells) > 2 and cells[1] in ("gauge", "counter"):
                yield cells[0], cells[1], (*labels, "DCGM_FI_DRIVER_VERSION", "container", "namespace", "pod")


def container(path: Path) -> Iterator[Row]:
    """cAdvisor's table, as the kubelet exports it."""
    labels = ("id", "image", "name", "container", "namespace", "pod", "cpu", "device", "interface")
    for name, kind in re.findall(r"^`(container_\w+|machine_\w+)` \| (\w+)", path.read_text("utf-8"), re.M):
        yield name, kind.lower(), (*labels, "failure_type", "scope", "state", "event")


def keda(path: Path) -> Iterator[Row]:
    """KEDA's declarations."""
    text = path.read_text("utf-8")
    shared = re.findall(r'"(\w+)"', re.search(r"metricLabels += \[\]string\{(.*?)\}", text)[1])  # type: ignore[index]
    for kind, body, labels in re.findall(
        r"New(Gauge|Counter)(?:Vec)?\(\s*prometheus\.\w+\{(.*?)\},\s*(.*?)\)\n", text, re.S
    ):
        part = dict(re.findall(r'(Subsystem|Name): +"(\w+)"', body))
        name = "_".join(["keda", *([part["Subsystem"]] if "Subsystem" in part else []), part["Name"]])
        yield (
            name,
            kind.lower(),
            tuple(re.findall(r'"(\w+)"', labels)) or (tuple(shared) if "metricLabels" in labels else ()),
        )


_AIBRIX = "namespace pod model lora_adapter engine_type roleset role role_replica_index gateway_pod *".split()
"""Of what its gateway plugin makes of engines' metrics; `*`, since each call may bring more."""


def aibrix(root: Path) -> Iterator[Row]:
    """AIBrix' gateway plugin, which shows engines' metrics under names of its own, without `vllm:`, and what
    its other programs declare; less what vLLM has removed, and what others have under the same name."""
    texts = [path.read_text("utf-8") for path in sorted(root.rglob("*.go")) if "_test" not in path.name]
    constant = r'^\s*(\w+)\s*=\s*"(\w+)"'
    names = {key: name for text in texts for key, name in re.findall(constant, text, re.M)}
    entry = r"^\t\t(\w+): \{[^{}]*\{\s*Raw:\s*(Gauge|Counter|Histogram)"
    for text in texts:
        for key, kind in re.findall(entry, text, re.M):
            name = names[key]
            if foreign.gone(f"vllm:{name}") or name.startswith("http_"):
                continue
            yield name, kind.lower(), tuple(_AIBRIX)
            if kind == "Histogram":
                yield from ((f"{name}_p{share}", "gauge", tuple(_AIBRIX)) for share in (50, 90, 99))
        for made in re.split(r"\.New(?=Gauge|Counter|Histogram)", text)[1:]:
            kind, body = made.partition("Vec")[0].partition("(")[0], made.partition("}")[0]
            labels = made.partition("[]string{")[2].partition("}")[0]
            part = dict(re.findall(r'(Subsystem|Name):\s+(?:constants\.)?"?(\w+)"?', body))
            words = [names.get(part[key], part[key]) for key in ("Subsystem", "Name") if key in part]
            if "Subsystem" in part:
                yield "_".join(words), kind.lower(), tuple(re.findall(r'"(\w+)"', labels)) or ("*",)


def page(path: Path, *prefixes: str) -> Iterator[Row]:
    """What a program answers at /metrics."""
    for family in text_string_to_metric_families(path.read_text("utf-8")):
        if family.name.startswith(prefixes):
            labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield name, family.type, tuple(label for label in labels if label not in ("le", "quantile"))


def main() -> None:
    """See above."""
    which, *paths, version = sys.argv[1:]
    files = [Path(path) for path in paths]
    if which in ("node", "prometheus"):
        rows = page(files[0], f"{which}_", *(("scrape_",) if which == "prometheus" else ()))
    else:
        readers = {
            "vllm": vllm,
            "kube": kube,
            "dcgm": dcgm,
            "container": container,
            "keda": keda,
            "aibrix": aibrix,
        }
        rows = readers[which](*files)
    found: dict[str, Row] = {}
    for row in rows:
        if len(row[2]) >= len(found.get(row[0], row)[2]):
            found[row[0]] = row
    lines = [
        f"# {version}",
        *("\t".join((name, kind, " ".join(labels))).rstrip() for name, kind, labels in found.values()),
    ]
    TABLES.mkdir(exist_ok=True)
    (TABLES / f"{which}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{which}: {len(found)}")


if __name__ == "__main__":
    main()
