"""Weights: one volume, written once by a Job for each model, read by all its engines.

    ReadWriteMany   claim `weights` ◀─ Job weights-<model>: `penstock models pull`
                                    ◀─ engines, read only, which wait until the model is there
    ReadWriteOnce   every pod has a volume of its own, and pulls for itself before its engine starts

The claim is a store (penstock.operate.models): versions, checksums, one link to what is current. A folder
that the spec names as /models/… is put there by somebody else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

from penstock.core.errors import StartupError
from penstock.fleet.hardware import GIB

from . import names, pods
from .objects import kinds
from .objects.base import Object
from .objects.pod import (
    ClaimSpec,
    ClaimTemplate,
    ClaimVolume,
    Container,
    Env,
    EnvSource,
    EphemeralVolume,
    KeyRef,
    Mount,
    PodTemplate,
    Resources,
    TemplateMetadata,
    Volume,
)
from .pods import metadata
from .workloads import Bundle, Workload

FOLDER = "/models"
FILLER = "copy-weights"
"""Name of the pod through which somebody copies weights of their own onto the claim."""
_FETCH_RATE = 10 * 10**6
"""Bytes a second at which weights are fetched at least, before it counts as stuck; an assumption."""
_WAIT_PERIOD = 2


def objects(bundle: Bundle) -> Iterator[Object]:
    """The claim, and a Job for each model that is fetched."""
    if not shared(bundle):
        _refuse_own(bundle)
        return
    if not _stored(bundle):
        return
    labels = names.labels("weights", names.WEIGHTS, bundle.namespace)
    yield kinds.claim(
        metadata(bundle, names.WEIGHTS, labels), _claim(bundle, _all_bytes(bundle), bundle.claimed)
    )
    for slug in dict.fromkeys(each.slug for each in _stored(bundle)):
        workload = bundle.of(slug)[0]
        if fetched(workload):
            yield _job(bundle, workload)


def shared(bundle: Bundle) -> bool:
    """Whether all pods have one volume."""
    return bundle.spec.cluster.storage.access == "ReadWriteMany"


def fetched(workload: Workload) -> bool:
    """Whether its weights come from the hub."""
    return workload.weights != "demo" and not workload.weights.startswith("/")


def own(bundle: Bundle) -> tuple[Workload, ...]:
    """One workload of each model whose weights somebody else puts onto the volume."""
    found = {each.slug: each for each in _stored(bundle) if not fetched(each)}
    return tuple(found.values())


def _refuse_own(bundle: Bundle) -> None:
    for workload in own(bundle):
        raise StartupError(
            f"models.{workload.model_name}.weights: {workload.weights} is a folder of a volume that all pods "
            "share, and with cluster.storage.access: ReadWriteOnce each pod has an empty one of its own.",
            param=f"models.{workload.model_name}.weights",
            advice="Write access: ReadWriteMany, or name an id of Hugging Face.",
        )


def _stored(bundle: Bundle) -> tuple[Workload, ...]:
    return tuple(each for each in bundle.workloads if each.weights != "demo")


def _all_bytes(bundle: Bundle) -> int:
    return sum({each.slug: each.weights_bytes for each in _stored(bundle)}.values())


def claimed(bundle: Bundle) -> int:
    """Bytes of the claim that all pods share; 0 where there is none."""
    if not shared(bundle) or not _stored(bundle):
        return 0
    return max(_size(bundle, _all_bytes(bundle)), bundle.claimed)


def _size(bundle: Bundle, weights: int) -> int:
    """Twice the weights: the next version of a model is there before the old one goes."""
    wanted = bundle.spec.cluster.storage.size
    return wanted or math.ceil((2 * weights + 10 * GIB) / (10 * GIB)) * 10 * GIB


def _claim(bundle: Bundle, weights: int, least: int = 0) -> ClaimSpec:
    wanted = bundle.spec.cluster.storage
    size = max(_size(bundle, weights), least)
    return ClaimSpec(
        access_modes=(wanted.access,),
        storage_class_name=wanted.storage_class,
        resources=Resources(requests={"storage": pods.quantity(size)}),
    )


def engine_volumes(bundle: Bundle, workload: Workload) -> tuple[tuple[Volume, ...], tuple[Mount, ...]]:
    """Where an engine finds weights: read only (S71)."""
    if workload.weights == "demo":
        return (), ()
    mount = Mount(name="weights", mount_path=FOLDER, read_only=True)
    if shared(bundle):
        volume = Volume(
            name="weights", persistent_volume_claim=ClaimVolume(claim_name=names.WEIGHTS, read_only=True)
        )
    else:
        volume = Volume(
            name="weights",
            ephemeral=EphemeralVolume(
                volume_claim_template=ClaimTemplate(spec=_claim(bundle, workload.weights_bytes))
            ),
        )
    return (volume,), (mount,)


def init_containers(bundle: Bundle, workload: Workload) -> tuple[Container, ...]:
    """What is done before an engine starts: wait for its weights, or fetch them."""
    if workload.weights == "demo":
        return ()
    if not shared(bundle):
        return (_fetch(bundle, workload),) if fetched(workload) else ()
    tries = math.ceil(deadline(workload) / _WAIT_PERIOD)
    see = (
        f"see the Job {job_name(workload, bundle.images['penstock'])}"
        if fetched(workload)
        else f"copy it onto the claim {names.WEIGHTS}, as README.md shows"
    )
    return (
        Container(
            name="wait-for-weights",
            image=bundle.images["penstock"],
            command=("sh", "-c"),
            args=(
                f"for try in $(seq {tries}); do [ -e {workload.weights_path}/config.json ] && exit 0; "
                f"sleep {_WAIT_PERIOD}; done; "
                f"echo 'there is no {workload.weights_path}/config.json: {see}' >&2; exit 1",
            ),
            resources=pods.resources(cpus="10m", memory=32 << 20),
            security_context=pods.RESTRICTED,
            volume_mounts=(Mount(name="weights", mount_path=FOLDER, read_only=True),),
        ),
    )


def job_name(workload: Workload, image: str) -> str:
    """With a hash of what it does: a Job cannot be changed, so another one is another Job."""
    digest = hashlib.blake2b(f"{workload.weights} {image}".encode(), digest_size=3).hexdigest()
    return f"weights-{workload.slug}-{digest}"


def wait(bundle: Bundle, workload: Workload) -> int:
    """Seconds for which a pod may wait for its weights, or fetch them, before its engine starts."""
    return deadline(workload) if init_containers(bundle, workload) else 0


def deadline(workload: Workload) -> int:
    """Seconds that fetching may take."""
    return 600 + math.ceil(workload.weights_bytes / _FETCH_RATE)


def _fetch(bundle: Bundle, workload: Workload) -> Container:
    """`penstock models pull`: goes on where it stopped, compares checksums, and makes current what is whole;
    nobody sees half of a model. What is there already is done at once."""
    token = bundle.spec.cluster.storage.token_secret
    _, mounts = pods.scratch()
    return Container(
        name="fetch-weights",
        image=bundle.images["penstock"],
        command=("penstock", "models", "pull"),
        args=(workload.weights, workload.slug, f"--store={FOLDER}"),
        env=(
            *pods.home_env(),
            *(
                (Env(name="HF_TOKEN", value_from=EnvSource(secret_key_ref=KeyRef(name=token, key="token"))),)
                if token is not None
                else ()
            ),
        ),
        resources=pods.resources(cpus="1", memory=4 * GIB),
        security_context=pods.RESTRICTED,
        volume_mounts=(Mount(name="weights", mount_path=FOLDER), *mounts),
    )


def _job(bundle: Bundle, workload: Workload) -> Object:
    name = job_name(workload, bundle.images["penstock"])
    labels = names.labels("weights", name, bundle.namespace, model=workload.slug)
    own, _ = pods.scratch()
    return kinds.job(
        metadata(bundle, name, labels),
        kinds.JobSpec(
            backoff_limit=6,
            active_deadline_seconds=deadline(workload),
            template=PodTemplate(
                metadata=TemplateMetadata(labels=labels),
                spec=pods.ending(
                    bundle, "weights", _fetch(bundle, workload), (_on_claim(), *own), "OnFailure"
                ),
            ),
        ),
    )


def _on_claim() -> Volume:
    """To be written to."""
    return Volume(name="weights", persistent_volume_claim=ClaimVolume(claim_name=names.WEIGHTS))


def filler(bundle: Bundle) -> dict[str, Any]:
    """A pod that does nothing, and may write to the claim: what files are copied through, and then ended. The
    namespace admits it."""
    container = Container(
        name="copy",
        image=bundle.images["penstock"],
        command=("sleep", "86400"),
        resources=pods.resources(cpus="250m", memory=GIB),
        security_context=pods.RESTRICTED,
        volume_mounts=(Mount(name="weights", mount_path=FOLDER),),
    )
    spec = pods.ending(bundle, "weights", container, (_on_claim(),))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": FILLER, "namespace": bundle.namespace},
        "spec": spec.to_dict(),
    }
