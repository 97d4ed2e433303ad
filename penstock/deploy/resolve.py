"""From a spec to what runs: one Workload for each Deployment, with everything decided that files need.

    Spec ─▶ replicas settled ─▶ sized, for each tier of each model ─▶ Bundle

Pure: the catalogues are its only other source. What cannot be is a StartupError that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Literal

from penstock import __version__
from penstock.core.errors import StartupError
from penstock.fleet import catalogue
from penstock.fleet.hardware import GIB, Device
from penstock.spec.cluster import Images
from penstock.spec.model import Model, Pool, Spec
from penstock.spec.references import problems
from penstock.spec.units import NANO

from . import names, providers
from .flags import engine_flags
from .sizing import Sizing, device_of, replicas, size
from .workloads import ENGINE_KEY, PRE_STOP, SPARE, TRACES, Bundle, GatewayPlan, Tier, Workload

DISK_RATE = 250 * 10**6
"""Bytes a second at which weights are read where nobody says how long they load: of network disks, an
assumption."""
START = 120.0
"""Seconds that an engine takes to start beside reading weights: an assumption."""
CPU_START = 60.0
"""The same for our engine on a CPU."""
_GATED = (
    *("meta-llama/", "google/gemma-", "google/embeddinggemma-", "google/medgemma-", "mistralai/"),
    *("CohereLabs/", "CohereForAI/", "bigcode/starcoder", "tiiuae/falcon-180B", "databricks/dbrx-"),
)
"""Beginnings of ids on Hugging Face of which some or all want an account's agreement, which may change from
day to day: only the hub knows, and it is not asked here."""
_TPU_NODES, _TPU_TOPOLOGY = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"
"""Labels without which GKE finds no node for a pod that asks for google.com/tpu."""
CRON_NAME = 52
"""Letters of a CronJob's name; Kubernetes appends eleven for its Jobs."""
ONCE_NAME = 56
"""Letters of the name of a job that runs once; it is a label of 63, and ends in a hash of seven."""


def resolve(spec: Spec) -> Bundle:
    """Decide everything. Raises StartupError, naming the field, for what cannot be."""
    if not spec.models:
        raise StartupError(
            "There is nothing under models: that could be compiled.",
            advice="`penstock init` writes an example.",
        )
    images = images_of(spec.cluster.images)
    slugs = names.slugs(spec.models)
    _check_jobs(spec)
    spec, taken = _settled(spec)
    workloads: list[Workload] = []
    assumed: list[str] = list(taken)
    for name, model in spec.models.items():
        for tier, pool_name in _tiers(model):
            sizing = size(spec, name, model, pool_name)
            assumed += sizing.assumed
            workloads.append(_workload(spec, name, slugs[name], model, tier, pool_name, sizing, images))
    return Bundle(
        spec=spec,
        namespace=spec.cluster.namespace,
        workloads=tuple(workloads),
        gateway=_gateway(spec, images),
        slugs=slugs,
        images=images,
        assumed=tuple(dict.fromkeys((*assumed, *_left_out(spec)))),
    )


def _settled(spec: Spec) -> tuple[Spec, tuple[str, ...]]:
    """(The spec with as many replicas as each model's load takes, what is to be told of them). Raises
    StartupError where a pool has too few devices for them."""
    models = dict(spec.models)
    words: list[str] = []
    for name, model in spec.models.items():
        wanted, told = replicas(spec, name)
        words += told
        if wanted != model.replicas:
            models[name] = model.model_copy(update={"replicas": wanted})
    if not words:
        return spec, ()
    settled = spec.model_copy(update={"models": models})
    for place, what in problems(settled):  # none before
        where = ".".join(map(str, place))
        raise StartupError(f"{where}: {what}", param=where, advice=f"{'; '.join(words)}.")
    return settled, tuple(words)


def _check_jobs(spec: Spec) -> None:
    """Raises StartupError for a job that no CronJob can be named after, or that writes where it cannot."""
    for name, job in spec.jobs.items():
        if job.schedule is not None and len(name) > CRON_NAME:
            raise StartupError(
                f"jobs.{name}: a CronJob's name has {CRON_NAME} letters at most; this has {len(name)}.",
                advice="Give it a shorter one.",
            )
        if job.schedule is None and len(name) > ONCE_NAME:
            raise StartupError(
                f"jobs.{name}: the name of a job that runs once has {ONCE_NAME} letters at most; this has "
                f"{len(name)}.",
                advice="Give it a shorter one.",
            )
        folder = PurePosixPath(job.input).parent
        if not PurePosixPath(job.output).is_relative_to(folder) or ".." in job.output:
            raise StartupError(
                f"jobs.{name}.output: {job.output} is not in {folder}, where the volume {job.volume} is.",
                advice=f"Write {folder}/….",
            )


def _left_out(spec: Spec) -> Iterator[str]:
    """What a cluster does otherwise than this spec says."""
    if spec.gateway.ssl_certfile is not None:
        yield "gateway.ssl_certfile: left out; TLS ends at the entry (cluster.entry.tls)"
    for name, model in spec.models.items():
        vendor = catalogue.find_device(spec.pools[model.pool].hardware).vendor
        if vendor == "amd" and model.image is None:
            yield f"models.{name}: vLLM's image for ROCm, of which nothing here has run"
        labels = spec.pools[model.pool].nodes.labels
        if vendor == "tpu" and not {_TPU_NODES, _TPU_TOPOLOGY} <= set(labels):
            yield (
                f"models.{name}: GKE places pods on TPUs by {_TPU_NODES} and {_TPU_TOPOLOGY} (as "
                f"2x2), which only pools.{model.pool}.nodes.labels can say; nothing here has run on TPUs"
            )
    if spec.gateway.first_key and "first_key" in spec.gateway.model_fields_set:
        yield "gateway.first_key: true: a gateway prints the first key into its pod's log, and it is kept"
    for name, model in spec.models.items():
        if model.weights.startswith(_GATED) and spec.cluster.storage.token_secret is None:
            yield (
                f"models.{name}: {model.weights} may be given only to who has agreed to its licence; without "
                "cluster.storage.token_secret it is fetched without a token, and then refused (401)"
            )
        if model.scale is not None and spec.cluster.autoscaler == "hpa" and model.scale.max > model.replicas:
            pool_name = model.scale.burst or model.pool
            price = spec.pools[pool_name].price_per_hour
            paid = f", for ${price * model.devices / NANO:,.2f} an hour" if price is not None else ""
            yield (
                f"models.{name}: a HorizontalPodAutoscaler keeps one replica of the burst on "
                f"pools.{pool_name} for ever{paid}; cluster.autoscaler: keda ends it"
            )
        if model.scale is None or model.scale.burst is None:
            continue
        floor, burst = spec.pools[model.pool], spec.pools[model.scale.burst]
        if floor.price_per_hour is not None and burst.price_per_hour != floor.price_per_hour:
            yield (
                f"models.{name}: device-seconds of the burst are priced as the floor's "
                f"(pools.{model.pool}); the gateway does not tell them apart"
            )


def images_of(images: Images) -> dict[str, str]:
    """The images, pinned. Raises StartupError for one without a tag, whose content changes.

    `:latest` is taken where somebody wrote it down: that is an explicit choice, which `penstock check` tells.
    """
    prefix = f"{images.registry.rstrip('/')}/" if images.registry else ""
    return {
        "penstock": pinned(images.penstock, "cluster.images.penstock")
        or f"{prefix}penstock:{__version__}-cpu",
        "penstock_cuda": pinned(images.penstock_cuda, "cluster.images.penstock_cuda")
        or f"{prefix}penstock:{__version__}-cuda",
        "vllm": pinned(images.vllm, "cluster.images.vllm") or "",
    }


def pinned(image: str | None, where: str) -> str | None:
    """The image, which has a tag or a digest. Raises StartupError."""
    if image is not None and ":" not in image.rpartition("/")[2]:
        raise StartupError(
            f"{where}: {image} has no tag, which is :latest: what runs would change by itself.",
            advice=f"Write {image}:VERSION, or {image}@sha256:….",
        )
    return image


def _tiers(model: Model) -> tuple[tuple[Tier, str], ...]:
    """(tier, pool): the floor stays, what is beyond it is scaled."""
    if model.scale is None or model.scale.max == model.replicas:
        return (("all", model.pool),)
    return (("floor", model.pool), ("burst", model.scale.burst or model.pool))


def _workload(
    spec: Spec,
    name: str,
    slug: str,
    model: Model,
    tier: Tier,
    pool_name: str,
    sizing: Sizing,
    images: Mapping[str, str],
) -> Workload:
    pool, device = spec.pools[pool_name], device_of(spec, pool_name)
    cpu = device.vendor == "cpu"
    cpus = _cpus(model, sizing, cpu)
    resource = providers.resource_of(device.vendor, pool.mig)
    provider = spec.cluster.provider
    low, high = _bounds(spec, model, tier)
    drain, pre_stop = spec.cluster.drain, PRE_STOP
    if pool.purchase == "spot":
        # the node ends with its notice, whatever the grace period says
        pre_stop = min(PRE_STOP, providers.MARKS[provider].notice // 6)
        drain = min(drain, float(providers.MARKS[provider].notice - pre_stop - SPARE // 3))
    return Workload(
        name=_name(slug, tier, model),
        slug=slug,
        model_name=name,
        weights=model.weights,
        weights_path=_path(name, slug, model),
        weights_bytes=sizing.weights_bytes,
        engine=model.engine,
        image=_image(name, model, device, images),
        pool_name=pool_name,
        pool=pool,
        device=device,
        tier=tier,
        replicas=low,
        min_replicas=low,
        max_replicas=high,
        nodes=model.nodes,
        devices_per_node=0 if cpu else model.devices // model.nodes,
        resource=resource,
        flags=engine_flags(model, sizing, threads=cpus if cpu else None, drain=drain),
        max_model_len=sizing.max_model_len,
        max_num_seqs=int(model.flags.get("max-num-seqs", sizing.max_num_seqs)),
        memory=sizing.memory,
        cpus=cpus,
        shm=(16 if model.devices > 1 else 8) * GIB if not cpu else GIB // 4,
        load_time=spec.cluster.load_time
        or math.ceil((CPU_START if cpu else START) + sizing.weights_bytes / DISK_RATE),
        drain=drain,
        pre_stop=pre_stop,
        taints=providers.taints(provider, resource, pool),
        device_labels=None if cpu else providers.device_labels(provider, _hardware(pool), pool),
        surge=_surge(spec, model, pool_name, cpu),
        slo=model.slo,
        utilization_target=model.scale.utilization if model.scale else None,
        waiting_target=model.scale.waiting if model.scale else None,
        cooldown=model.scale.cooldown if model.scale else None,
        namespace=spec.cluster.namespace,
    )


def _name(slug: str, tier: Tier, model: Model) -> str:
    """A LeaderWorkerSet has a Service of its own name for its nodes, which is not the model's."""
    if tier == "burst":
        return f"{slug}-burst"
    return f"{slug}-nodes" if model.nodes > 1 else slug


def _hardware(pool: Pool) -> str:
    return catalogue.find_device(pool.hardware).name


def _bounds(spec: Spec, model: Model, tier: Tier) -> tuple[int, int]:
    """(least, most) replicas. A HorizontalPodAutoscaler keeps at least one; KEDA ends the last."""
    if tier != "burst" or model.scale is None:
        return model.replicas, model.replicas
    most = model.scale.max - model.replicas
    return (min(1, most) if spec.cluster.autoscaler == "hpa" else 0), most


def _path(name: str, slug: str, model: Model) -> str:
    """Where the engine finds weights. Raises StartupError for a folder of this machine."""
    if model.weights == "demo":
        if model.engine != "penstock":
            raise StartupError(
                f"models.{name}.weights: demo is in Penstock's image, and {model.engine} has its own.",
                advice="Write engine: penstock, or other weights.",
            )
        return "demo"
    if model.weights.startswith("/models/"):
        return model.weights.rstrip("/")
    if model.weights.startswith(("/", ".", "~")):
        raise StartupError(
            f"models.{name}.weights: {model.weights} is a folder of this machine, which pods do not see.",
            advice="Name an id of Hugging Face; or copy it onto the volume `weights`, and write /models/….",
        )
    return f"/models/{slug}/current"  # of the store that `penstock models` keeps


def _image(name: str, model: Model, device: Device, images: Mapping[str, str]) -> str:
    """Of the engine. Raises StartupError where ours or vLLM's usual one has nothing for the device."""
    if model.image is not None:
        return pinned(model.image, f"models.{name}.image") or ""
    if model.engine == "penstock":
        return images["penstock" if device.vendor == "cpu" else "penstock_cuda"]
    usual, rocm = "vllm/vllm-openai:", "vllm/vllm-openai-rocm:"
    if device.vendor == "amd" and images["vllm"].startswith(usual):
        return images["vllm"].replace(usual, rocm)  # of the same releases, since January 2026
    if device.vendor != "nvidia":
        raise StartupError(
            f"models.{name}.image: {images['vllm']} is for NVIDIA's GPUs, and the pool has {device.name}.",
            advice="Name vLLM's image for it: one of vllm/vllm-tpu, which has tags of its own."
            if device.vendor == "tpu"
            else "Name vLLM's image for it, as vllm/vllm-openai-cpu:v0.32.0.",
        )
    return images["vllm"]


def _cpus(model: Model, sizing: Sizing, cpu: bool) -> int:
    """Cores: two for the processes of an engine and two for each GPU; on a CPU, as many as the weights are
    worth."""
    if not cpu:
        return 2 + 2 * (model.devices // model.nodes)
    if "threads" in model.flags:
        return int(model.flags["threads"])
    return max(1, min(8, math.ceil(sizing.memory / (4 * GIB))))


def _surge(spec: Spec, model: Model, pool_name: str, cpu: bool) -> int:
    """Replicas of this model for which its pool has devices free, when all others have their most (T12)."""
    if cpu:
        return 1
    taken = 0
    for each in spec.models.values():
        burst = each.scale.burst or each.pool if each.scale else each.pool
        most = each.scale.max if each.scale else each.replicas
        taken += each.replicas * each.devices * (each.pool == pool_name)
        taken += max(0, most - each.replicas) * each.devices * (burst == pool_name)
    return max(0, (spec.pools[pool_name].count - taken) // model.devices)


def _gateway(spec: Spec, images: Mapping[str, str]) -> GatewayPlan:
    database: Literal["sqlite", "postgresql"] = (
        "sqlite" if spec.ledger.url.startswith("sqlite") else "postgresql"
    )
    admin = spec.gateway.admin
    wanted = [ENGINE_KEY]
    wanted += [each.api_key_env for each in spec.upstreams.values() if each.api_key_env is not None]
    wanted += [admin.key_env] if admin is not None else []
    wanted += [spec.gateway.metrics_key_env] if spec.gateway.metrics_key_env is not None else []
    # where spans go is the cluster's matter, and its headers may be a key
    wanted += [TRACES] if spec.gateway.tracing else []
    wanted += ["PENSTOCK_LEDGER_PASSWORD"] if database == "postgresql" else []
    return GatewayPlan(
        image=images["penstock"],
        replicas=spec.cluster.gateway_replicas or (2 if database == "postgresql" else 1),
        workers=spec.gateway.workers,
        port=spec.gateway.port or 8080,
        admin_port=admin.port if admin is not None else None,
        database=database,
        drain=spec.cluster.drain,
        secrets=tuple(dict.fromkeys(wanted)),
    )
