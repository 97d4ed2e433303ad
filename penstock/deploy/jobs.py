"""Work that nobody waits for, as the nightly indexing of documents: Jobs and CronJobs that send a file of
requests through the gateway, with a key of their own, so that they are in the ledger and under its limits,
and as background work, whatever the key's class: engines serve all others first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import PurePosixPath

from penstock.fleet.hardware import GIB
from penstock.spec.cluster import Job

from . import names, pods
from .objects import kinds
from .objects.base import Object
from .objects.pod import (
    ClaimVolume,
    Container,
    Env,
    EnvSource,
    KeyRef,
    Mount,
    PodSpec,
    PodTemplate,
    TemplateMetadata,
    Volume,
)
from .pods import metadata
from .workloads import Bundle


def objects(bundle: Bundle) -> Iterator[Object]:
    """One for each of the spec's `jobs`."""
    for name, job in bundle.spec.jobs.items():
        labels = names.labels("job", name, bundle.namespace)
        spec = kinds.JobSpec(
            backoff_limit=3,  # what has been answered is not asked again
            active_deadline_seconds=math.ceil(job.deadline),
            ttl_seconds_after_finished=7 * 86_400 if job.schedule is not None else None,
            template=PodTemplate(metadata=TemplateMetadata(labels=labels), spec=_pod(bundle, job)),
        )
        if job.schedule is None:
            yield kinds.job(metadata(bundle, once_name(name, spec), labels), spec)
            continue
        yield kinds.cron_job(
            metadata(bundle, name, labels),
            kinds.CronJobSpec(
                schedule=job.schedule,
                time_zone="Etc/UTC",
                concurrency_policy="Forbid",
                starting_deadline_seconds=3600,
                successful_jobs_history_limit=3,
                failed_jobs_history_limit=3,
                job_template=kinds.JobTemplate(metadata={"labels": labels}, spec=spec),
            ),
        )


def once_name(name: str, spec: kinds.JobSpec) -> str:
    """With a hash of all that it does: a Job cannot be changed, so another one is another Job. One that is
    done stays, and applying again does not do it again."""
    return f"{name}-{hashlib.blake2b(repr(spec).encode(), digest_size=3).hexdigest()}"


def _pod(bundle: Bundle, job: Job) -> PodSpec:
    own, mounts = pods.scratch(GIB)
    url = f"http://{names.GATEWAY}.{bundle.namespace}.svc:{bundle.gateway.port}/v1"
    container = Container(
        name="batch",
        image=bundle.images["penstock"],
        command=("penstock", "batch"),
        args=(job.input, f"--output={job.output}", f"--url={url}", "--background"),
        env=(
            Env(
                name="PENSTOCK_API_KEY",
                value_from=EnvSource(secret_key_ref=KeyRef(name=job.key_secret, key="key")),
            ),
            *pods.home_env(),
        ),
        resources=pods.resources(cpus="250m", memory=GIB),
        security_context=pods.RESTRICTED,
        volume_mounts=(Mount(name="data", mount_path=str(PurePosixPath(job.input).parent)), *mounts),
    )
    volume = Volume(name="data", persistent_volume_claim=ClaimVolume(claim_name=job.volume))
    return pods.ending(bundle, "job", container, (volume, *own))
