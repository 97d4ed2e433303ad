"""docs/check.md, whose table is made from the rules.

python -m penstock.cli.check_page > docs/check.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from penstock.check import Rule, rules
from penstock.check.run import subjects

_HEAD = """\
# Checking what will run

<!-- made by `python -m penstock.cli.check_page > docs/check.md`; a test compares them -->

```
penstock check                                  # this folder
penstock check bundle/ penstock.yaml            # files and folders; their objects are one cluster
helm template chart | penstock check -          # what a chart becomes
penstock check . --crds crds/ --kubernetes 1.33 --free-gpus 1 --strict --format sarif > findings.sarif
penstock check --explain rollout-deadlock
```

It reads texts and starts nothing: no cluster, no program, no network. A finding has a rule, a file with
line and column, why it hurts and what to write instead. The exit status is 0 when nothing was found, 1 for
errors (with `--strict`, for warnings, too), 2 when something could not be read, or a folder has nothing to
check. `pip install 'penstock[check]'` brings the Kubernetes schemas, a reader of PromQL and the grammars of
shell, JavaScript, TypeScript and Markdown; without them, a note says what was not checked.

## What it reads

| texts | what is asked of them |
|---|---|
| Kubernetes YAML and JSON, `kind: List`, several documents of a file | schemas, names that lead nowhere, \
probes, drain, devices, security, the way of a request |
| custom resources (KEDA, Prometheus operator, Gateway API, LeaderWorkerSet, …) | their definitions, with \
`--crds` |
| PrometheusRule, rule files, dashboards, queries of KEDA, HPA and prometheus-adapter | metrics that the \
engine, the gateway and known exporters have; what a query means |
| command lines in pods, Compose, shell, Dockerfiles, systemd units, Markdown, CI | flags of vLLM 0.32 \
and Penstock, images, keys |
| `penstock.yaml` | what the loader says, and what is unwise |
| Python, JavaScript, TypeScript, configurations of agents | calls without a bound |

- Objects of all texts are one cluster: who selects, names, mounts, scales and calls whom. A name that is
  nowhere is an error where there are others of its kind. Secrets and claims are often made by hand: each is
  one note, with the entries that it needs.
- Code blocks of Markdown are read as what they are called: shell, Python, JavaScript and TypeScript as such.
  Kubernetes YAML in them is read for command lines, images, keys and queries only: no schema, name or probe
  is asked about, since a block is often an excerpt. Put it into a file to have it checked.
- A template of Helm is no YAML: it is named, and passed over. Check what `helm template` prints. Files that
  a kustomization takes for patches are parts of objects, and passed over, too.
- What cannot be parsed is a finding, and hides nothing of the documents beside it. Files have 16 MiB at
  most, documents 100 levels and a million entries, aliases written out; a folder has 20,000 files at most.
  Folders of others' work (`node_modules`, `venv`, `target`, `.git` and others that begin with a dot, but
  for `.github`) are passed over.
- Values are read as Kubernetes reads them: `yes` is a boolean, `2001-01-01` a text, `0644` the number 420.
- How commands, code and configurations are read, and what is taken for granted there, is in
  [check-code.md](check-code.md).

## Passing a finding by

```yaml
replicas: 1  # penstock: ignore[single-replica] a demo, which may be away
```

At the end of a line, it covers that line and what is nested in it; alone on its line, the next one that
way; above the first line of a document, the whole document. `ignore-file[rule]` covers the file, `--ignore
rule` everything. Several rules stand with commas. A comment without a reason, or that covers nothing, is a
note; one that names a rule that is not there, a warning.

## Where facts come from

- Kubernetes objects: the JSON schemas of the package `kubernetes-validate` (strict: an unknown field is an
  error), of the newest version that is installed or of `--kubernetes`. Words that a field may hold
  (`strategy.type`, `restartPolicy`, an `operator`), which those schemas leave open, are a table of
  `penstock/check/enumerations.py`; pods in custom resources are checked against their definitions only.
  Quantities, names and labels beyond the schemas: the rules of Kubernetes' API conventions. Pods in a
  namespace that enforces a Pod Security Standard: that standard's table.
- `gpu-count`: tensor × pipeline × data parallel ranks against GPUs of the pod, times the nodes of a
  LeaderWorkerSet.
- `startup-short`: nobody loads faster than 60 s (10 s without a GPU) and 2 GB/s for the weights that the
  model's name tells. It finds what is too short for sure; `penstock compile` reckons with slower disks.
- `rollout-deadlock`: maxSurge and maxUnavailable as the controller rounds them (25 % of two replicas: one
  more, none fewer), against `--free-gpus` or the annotation `penstock.dev/free-devices`, which `penstock
  compile` writes.
- `grace-short`: terminationGracePeriodSeconds ≥ preStop (`sleep`, or the sleeps of its command) +
  `--shutdown-timeout`.
- `policy-blocks`: for each address of a Service in variables, arguments and mounted files of pods, and for
  each ServiceMonitor, whether NetworkPolicies let the connection through. Prometheus counts as another
  namespace's.
- `listen-port`, `model-not-served`, `file-missing`, `path-unmounted`, `weights-path`: what command lines and
  the gateway's file say, against ports, engines, mounts and Jobs among the objects. What is nowhere among
  them may be in an image, and is no finding; a path beside a mount is one only where the names are alike.
- `gpu-product`: the names that NVIDIA's drivers write, in `penstock/check/tables/gpu-products.txt`, less what
  MIG and sharing add. A name with a slip, or a part of a name, is a warning; another model, which may be
  newer than the table, a note.
- `volume-small`: bytes of the catalogue's models as they are published, of all that Jobs, init containers and
  engines fetch onto one volume. Claims of storage whose volumes have no size (EFS, NFS, local paths) and of
  volumes made by hand do not count.
- `probe-progress`: vLLM's `/health` answers 200 when the engine hangs (vllm#39863). It is right beside an
  alert on tokens or steps that do not grow.

## Rules

"""


def render() -> str:
    """The page."""
    return _HEAD + "\n".join(_tables())


def _tables() -> Iterator[str]:
    for title, found in subjects():
        yield f"### {title}\n"
        yield "| rule | severity | what | why | what to do |\n|---|---|---|---|---|"
        yield from (_row(rule) for rule in found)
        yield ""
    yield f"{len(rules())} rules."
    yield ""


def _row(rule: Rule) -> str:
    cells = (f"`{rule.id}`", rule.severity.value, rule.summary, rule.why, rule.fix)
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
