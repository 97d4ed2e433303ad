"""README.md of a bundle: what is in it, what must be there before, and how it is applied and looked at."""

from __future__ import annotations

from collections.abc import Iterator

from . import names, storage
from .derive import CONFIG
from .objects import dump
from .workloads import ENGINE_KEY, Bundle


def text(bundle: Bundle, format: str, source: str) -> str:
    """In Markdown."""
    lines = [
        f"# {bundle.namespace}",
        "",
        f"Made from `{source}` by `penstock compile`. Change that file, and compile again.",
        "",
        *_contents(bundle),
        *_before(bundle),
        *_apply(bundle, format),
        *_copy(bundle),
        *_look(bundle),
    ]
    if bundle.assumed:
        lines += ["## Assumed", "", "Nobody said these, and they decide:", ""]
        lines += [f"- {each}" for each in bundle.assumed] + [""]
    return "\n".join(lines)


def _contents(bundle: Bundle) -> Iterator[str]:
    yield "| pods | model | pool | replicas | each | ready after at most | stops within |"
    yield "|---|---|---|---|---|---|---|"
    for each in bundle.workloads:
        ready = f"{each.load_time:.0f} s"
        if wait := storage.wait(bundle, each):
            ready += f", and {wait} s for its weights the first time"
        count = f"{each.min_replicas} to {each.max_replicas}, by load" if each.scaled else f"{each.replicas}"
        if each.resource is None:
            size = f"{each.cpus} CPU"
        else:
            size = f"{each.devices_per_node} {each.resource}"
            size += f" on each of {each.nodes} nodes" if each.nodes > 1 else ""
        yield (
            f"| `{each.name}` | {each.model_name} | {each.pool_name} | {count} | {size} "
            f"| {ready} | {each.grace} s |"
        )
    plan = bundle.gateway
    yield f"| `gateway` | | | {plan.replicas} | {plan.workers} CPU | 120 s | {plan.grace} s |"
    yield ""


def _before(bundle: Bundle) -> Iterator[str]:
    cluster = bundle.spec.cluster
    yield "## Before"
    yield ""
    yield f"- Images: {', '.join(f'`{image}`' for image in _images(bundle))}."
    yield f"- The Secret `{cluster.secret}`, whose entries no file has:"
    yield ""
    yield "```"
    yield f"kubectl create namespace {bundle.namespace} --dry-run=client -o yaml | kubectl apply -f -"
    yield f"kubectl -n {bundle.namespace} create secret generic {cluster.secret} \\"
    entries = bundle.gateway.secrets
    for index, variable in enumerate(entries):
        value = '"$(openssl rand -hex 32)"' if variable == ENGINE_KEY else f'"${variable}"'
        yield f"  --from-literal={variable}={value}" + (" \\" if index + 1 < len(entries) else "")
    yield "```"
    yield ""
    if cluster.images.pull_secret is not None:
        yield f"- The Secret `{cluster.images.pull_secret}` (`kubectl create secret docker-registry`)."
    if cluster.storage.token_secret is not None:
        yield f"- The Secret `{cluster.storage.token_secret}` with `token`, from Hugging Face."
    for name, job in bundle.spec.jobs.items():
        yield f"- The Secret `{job.key_secret}` with `key`, and the claim `{job.volume}`, for the job {name}."
    if any(each.resource for each in bundle.workloads):
        yield "- NVIDIA's GPU Operator, so that nodes have the resources and labels that pods ask for."
    if any(each.nodes > 1 for each in bundle.workloads):
        yield "- LeaderWorkerSet's controller (v0.6 or later)."
    yield "- The Prometheus operator, for ServiceMonitor and PrometheusRule (as of kube-prometheus-stack)."
    if any(each.scaled for each in bundle.workloads):
        yield f"- {'KEDA' if cluster.autoscaler == 'keda' else 'prometheus-adapter (its values are here)'}."
    if cluster.entry is not None and cluster.entry.kind == "gateway-api":
        yield f"- The Gateway `{cluster.entry.class_name}`, whose listener takes {cluster.entry.host}."
    if cluster.entry is not None and cluster.entry.tls is not None and cluster.entry.tls.issuer is not None:
        yield f"- cert-manager, with the ClusterIssuer `{cluster.entry.tls.issuer}`."
    if any(each.weights != "demo" for each in bundle.workloads) and storage.shared(bundle):
        kind = cluster.storage.storage_class or "the cluster's default"
        yield f"- A storage class that several nodes can mount at a time (ReadWriteMany): {kind}."
    for each in storage.own(bundle):
        yield (
            f"- The files of {each.model_name} (config.json, weights, tokenizer) at `{each.weights}` on the "
            f'claim `{names.WEIGHTS}`. Its pods wait for them; "Copy" shows how they come there.'
        )
    yield ""


def _copy(bundle: Bundle) -> Iterator[str]:
    """Weights that no Job fetches. Engines read only, so a pod is lent that writes."""
    own = storage.own(bundle)
    if not own:
        return
    run = f"kubectl -n {bundle.namespace}"
    yield "## Copy"
    yield ""
    yield "No Job fetches these. Once applied, within the time that pods wait for weights:"
    yield ""
    yield "```"
    yield "kubectl apply -f - <<'END'"
    yield dump(storage.filler(bundle)).rstrip()
    yield "END"
    yield f"{run} wait --for=condition=Ready pod/{storage.FILLER} --timeout=10m"
    for each in own:
        yield f"{run} exec {storage.FILLER} -- mkdir -p {each.weights_path}"
        yield f"{run} cp MY_FOLDER/. {storage.FILLER}:{each.weights_path}"
    yield f"{run} delete pod {storage.FILLER}"
    yield "```"
    yield ""


def _images(bundle: Bundle) -> list[str]:
    return sorted({each.image for each in bundle.workloads} | {bundle.gateway.image})


def _apply(bundle: Bundle, format: str) -> Iterator[str]:
    yield "## Apply"
    yield ""
    yield "```"
    if format == "helm":
        yield f"helm upgrade --install {bundle.namespace} . --namespace {bundle.namespace}"
    elif format == "kustomize":
        yield "kubectl apply --server-side -k overlays/production"
    else:
        yield "kubectl apply --server-side -f ."
    yield "```"
    yield ""


def _look(bundle: Bundle) -> Iterator[str]:
    entry = bundle.spec.cluster.entry
    first = bundle.workloads[0]
    yield "## Look"
    yield ""
    yield "```"
    yield f"kubectl -n {bundle.namespace} get pods --watch"
    yield f"kubectl -n {bundle.namespace} exec deployment/{names.GATEWAY} -- \\"
    yield f"  penstock keys create --spec {CONFIG}/penstock.yaml first  # prints a key, once: $KEY below"
    if entry is None:
        port = bundle.gateway.port
        yield f"kubectl -n {bundle.namespace} port-forward service/{names.GATEWAY} {port}:{port} &"
        base = f"http://localhost:{port}"
    else:
        base = f"{'https' if entry.tls else 'http'}://{entry.host}"
    yield f'curl {base}/v1/chat/completions -H "Authorization: Bearer $KEY" \\'
    messages = '[{"role": "user", "content": "Hello"}]'
    body = f'{{"model": "{first.model_name}", "max_tokens": 64, "messages": {messages}}}'
    yield f"  -H 'Content-Type: application/json' -d '{body}'"
    yield "```"
    yield ""
