"""Objects of whole bundles: valid to Kubernetes, right with one another, and free of the documents' traps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest

from penstock.core.errors import StartupError
from penstock.deploy import names, readme, storage
from penstock.deploy.bundle import groups, objects
from penstock.deploy.network import patience
from penstock.deploy.resolve import resolve
from penstock.spec import loads

from .matrix import SPECS, bundle_of
from .schemas import problems

Plain = dict[str, Any]


@cache
def plain(name: str) -> tuple[Plain, ...]:
    """The objects of one of the specs, as Kubernetes has them."""
    return tuple(each.to_dict() for each in objects(bundle_of(name)))


def of(name: str, kind: str, called: str | None = None) -> list[Plain]:
    return [
        each
        for each in plain(name)
        if each["kind"] == kind and (called is None or each["metadata"]["name"] == called)
    ]


def the(name: str, kind: str, called: str) -> Plain:
    (found,) = of(name, kind, called)
    return found


def templates(each: Mapping[str, Any]) -> Iterator[Plain]:
    """Pod templates of an object."""
    spec = each.get("spec", {})
    if "leaderWorkerTemplate" in spec:
        yield spec["leaderWorkerTemplate"]["leaderTemplate"]
        yield spec["leaderWorkerTemplate"]["workerTemplate"]
    elif "jobTemplate" in spec:
        yield spec["jobTemplate"]["spec"]["template"]
    elif isinstance(spec.get("template"), dict):
        yield spec["template"]


def all_pods(name: str) -> list[tuple[Plain, Plain]]:
    """(object, pod template) of everything that makes pods."""
    return [(each, pod) for each in plain(name) for pod in templates(each)]


def engines(name: str) -> list[tuple[Plain, Plain]]:
    """(object, template) of the pods that serve."""
    return [
        (each, pod)
        for each, pod in all_pods(name)
        if pod["metadata"]["labels"][names.COMPONENT] == "engine"
        and pod["metadata"]["labels"].get("penstock.dev/role") != "worker"
    ]


def main(pod: Plain) -> Plain:
    found: Plain = pod["spec"]["containers"][0]
    return found


def expanded(name: str, each: Plain, pod: Plain) -> list[str]:
    """A container's arguments as it sees them."""
    values: dict[str, str] = {}
    for source in main(pod).get("envFrom", ()):
        values |= the(name, "ConfigMap", source["configMapRef"]["name"])["data"]
    words = []
    for word in main(pod)["args"]:
        for key, value in values.items():
            word = word.replace(f"$({key})", value)
        words.append(word)
    return words


every = pytest.mark.parametrize("name", SPECS)


# --- Kubernetes takes it


@every
def test_schemas_of_kubernetes_and_of_custom_resources(name: str) -> None:
    for each in plain(name):
        assert problems(each) == [], f"{each['kind']} {each['metadata']['name']}"


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_older_and_newer_clusters_take_it(version: str) -> None:
    for kind in ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "Ingress", "CronJob"):
        assert problems(of("hub", kind)[0], version) == []


def test_the_schemas_would_tell() -> None:
    broken = the("init", "Deployment", "demo") | {"spec": {"replicas": "two", "templates": {}}}
    assert problems(broken)
    group = the("nodes", "LeaderWorkerSet", "huge-nodes")
    assert problems({**group, "spec": {**group["spec"], "replica": 1}})


@every
def test_names_are_unique_and_everything_is_in_the_namespace(name: str) -> None:
    keys = [each.key for each in objects(bundle_of(name))]
    assert len(set(keys)) == len(keys)
    namespace = bundle_of(name).namespace
    assert all(
        each["metadata"].get("namespace") == namespace for each in plain(name) if each["kind"] != "Namespace"
    )
    assert plain(name)[0]["kind"] == "Namespace", "before what is in it"


@every
def test_the_same_spec_gives_the_same_objects(name: str) -> None:
    again = resolve(loads(SPECS[name], f"{name}.yaml"))
    assert tuple(each.to_dict() for each in objects(again)) == plain(name)


# --- objects fit one another


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


@every
def test_selectors_select_pods_and_ports_have_names(name: str) -> None:
    """T10, T11."""
    pods = [pod for _, pod in all_pods(name)]
    for each, pod in all_pods(name):
        if each["kind"] == "Deployment":
            assert matches(each["spec"]["selector"]["matchLabels"], pod["metadata"]["labels"])
    for service in of(name, "Service"):
        chosen = [pod for pod in pods if matches(service["spec"]["selector"], pod["metadata"]["labels"])]
        assert chosen, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            for pod in chosen:
                assert port["targetPort"] in {each["name"] for each in main(pod)["ports"]}
                assert all(each["protocol"] == "TCP" for each in (port, *main(pod)["ports"])), "for apply"
            assert port["name"] == port["targetPort"]
    for budget in of(name, "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        assert any(matches(selector, pod["metadata"]["labels"]) for pod in pods)


@every
def test_no_two_deployments_select_the_same_pods(name: str) -> None:
    deployments = [each for each in plain(name) if each["kind"] == "Deployment"]
    pods = {each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in deployments}
    for one in deployments:
        wanted = one["spec"]["selector"]["matchLabels"]
        mine = [other for other, labels in pods.items() if matches(wanted, labels)]
        assert mine == [one["metadata"]["name"]]


@every
def test_what_pods_refer_to_is_there_or_named_as_outside(name: str) -> None:
    spec = bundle_of(name).spec
    outside = {
        spec.cluster.secret,
        spec.cluster.images.pull_secret,
        spec.cluster.storage.token_secret,
        *(job.key_secret for job in spec.jobs.values()),
        *(job.volume for job in spec.jobs.values()),
    }
    there = {(each["kind"], each["metadata"]["name"]) for each in plain(name)}
    for _, pod in all_pods(name):
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in there
        volumes = {each["name"]: each for each in pod["spec"].get("volumes", ())}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in there or claim in outside
        for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
            assert {each["name"] for each in container["volumeMounts"]} <= volumes.keys()
            for variable in container.get("env", ()):
                source = variable.get("valueFrom", {}).get("secretKeyRef")
                assert source is None or source["name"] in outside
            for source in container.get("envFrom", ()):
                assert ("ConfigMap", source["configMapRef"]["name"]) in there
        for secret in pod["spec"].get("imagePullSecrets", ()):
            assert secret["name"] in outside


@every
def test_every_reference_in_arguments_is_an_entry(name: str) -> None:
    """S38, T17: flags by name, values from the ConfigMap, nothing left to a variable that no engine reads."""
    for each, pod in engines(name):
        words = expanded(name, each, pod)
        assert not any("$(ENGINE" in word for word in words)
        assert {"--max-model-len", "--max-num-seqs", "--shutdown-timeout", "--served-model-name"} <= {
            word.partition("=")[0] for word in words
        }
        assert not any(variable["name"].startswith("MAX_") for variable in main(pod)["env"])


@every
def test_changed_arguments_are_a_rollout(name: str) -> None:
    for _, pod in engines(name):
        assert pod["metadata"]["annotations"]["penstock.dev/arguments"]
    changed = SPECS["init"].replace("max_model_len: 2048", "max_model_len: 1024")
    other = [each.to_dict() for each in objects(resolve(loads(changed)))]
    deployment = next(each for each in other if each["kind"] == "Deployment")
    before = the("init", "Deployment", "demo")["spec"]["template"]["metadata"]["annotations"]
    assert deployment["spec"]["template"]["metadata"]["annotations"] != before


# --- engines


@every
def test_tensor_parallel_is_the_limit(name: str) -> None:
    """S19, S39."""
    for workload in bundle_of(name).workloads:
        if workload.resource is None:
            continue
        for each, pod in all_pods(name):
            if pod["metadata"]["labels"].get(names.INSTANCE) != workload.name:
                continue
            limit = main(pod)["resources"]["limits"][workload.resource]
            assert main(pod)["resources"]["requests"][workload.resource] == limit
            words = dict(word.partition("=")[::2] for word in expanded(name, each, pod))
            assert words["--tensor-parallel-size"] == limit
            assert [key for key in main(pod)["resources"]["limits"] if "/" in key] == [workload.resource]


@every
def test_probes_are_those_that_each_server_answers(name: str) -> None:
    """S63–S65, T14, T15: ours by progress; vLLM has one path. Ready within one short period."""
    for each, pod in engines(name):
        container, label = main(pod), pod["metadata"]["labels"][names.INSTANCE]
        workload = next(one for one in bundle_of(name).workloads if one.name == label)
        own = workload.engine == "penstock"
        probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
        paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
        assert paths == {
            "startup": "/readyz" if own else "/health",
            "readiness": "/readyz" if own else "/health",
            "liveness": "/livez" if own else "/health",
        }
        startup = probes["startup"]
        assert startup["periodSeconds"] <= 5
        assert startup["periodSeconds"] * startup["failureThreshold"] >= workload.load_time
        for kind in ("startup", "readiness", "liveness"):
            assert "initialDelaySeconds" not in container[f"{kind}Probe"], (
                "the startup probe waits for loading"
            )
            assert container[f"{kind}Probe"]["httpGet"]["port"] in {
                port["name"] for port in container["ports"]
            }
        assert each["kind"] != "Deployment" or each["spec"]["progressDeadlineSeconds"] > workload.load_time


def test_the_paths_of_probes_are_served_by_the_real_servers() -> None:
    from penstock.gateway import app as gateway
    from penstock.http.paths import PROBES
    from penstock.server import app as server

    wanted = {"/readyz", "/livez"}
    assert wanted <= set(PROBES), "without a key"
    for module in (server, gateway):
        assert all(f'"{path}"' in inspect.getsource(module) for path in wanted)


@every
def test_pods_end_after_their_requests(name: str) -> None:
    """S66, S67, T13: out of the Service first, then the drain, and grace for both."""
    for each, pod in engines(name):
        words = dict(word.partition("=")[::2] for word in expanded(name, each, pod))
        sleep = main(pod)["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert sleep >= 5
        assert pod["spec"]["terminationGracePeriodSeconds"] > sleep + float(words["--shutdown-timeout"])
    gateway = the(name, "Deployment", "gateway")["spec"]["template"]
    words = dict(word.partition("=")[::2] for word in main(gateway)["args"])
    sleep = main(gateway)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert gateway["spec"]["terminationGracePeriodSeconds"] > sleep + float(words["--shutdown-timeout"])


@every
def test_budgets_never_hold_up_a_drain(name: str) -> None:
    """S44, T9."""
    for budget in of(name, "PodDisruptionBudget"):
        assert "minAvailable" not in budget["spec"]
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    covered = {budget["metadata"]["name"] for budget in of(name, "PodDisruptionBudget")}
    assert covered == {workload.slug for workload in bundle_of(name).workloads} | {"gateway"}


@every
def test_rollouts_never_wait_for_a_device_that_nobody_has(name: str) -> None:
    """T12, G9: a surge only as far as the pool has devices free."""
    for workload in bundle_of(name).workloads:
        kind = "LeaderWorkerSet" if workload.nodes > 1 else "Deployment"
        spec = the(name, kind, workload.name)["spec"]
        if kind == "LeaderWorkerSet":
            rolling = spec["rolloutStrategy"]["rollingUpdateConfiguration"]
        elif spec["strategy"]["type"] == "Recreate":
            assert workload.surge == 0
            continue
        else:
            rolling = spec["strategy"]["rollingUpdate"]
        assert rolling["maxSurge"] <= workload.surge
        assert rolling["maxSurge"] + rolling["maxUnavailable"] == 1


def test_one_replica_without_a_free_device_is_recreated() -> None:
    assert the("mig", "Deployment", "vl")["spec"]["strategy"] == {"type": "Recreate"}


@every
def test_what_an_autoscaler_decides_is_not_in_the_file(name: str) -> None:
    for workload in bundle_of(name).workloads:
        kind = "LeaderWorkerSet" if workload.nodes > 1 else "Deployment"
        assert ("replicas" in the(name, kind, workload.name)["spec"]) == (not workload.scaled)


@every
def test_shared_memory_and_scratch_are_volumes(name: str) -> None:
    """S39, S95."""
    for _, pod in engines(name):
        mounts = {each["mountPath"]: each["name"] for each in main(pod)["volumeMounts"]}
        volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "sizeLimit" in volumes[mounts["/dev/shm"]]["emptyDir"]
        assert mounts["/tmp"]


@every
def test_pods_may_do_nothing_that_they_need_not(name: str) -> None:
    """The Pod Security Standard `restricted`, which the namespace enforces; no token, no root file system."""
    enforced = plain(name)[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert enforced == "restricted"
    for _, pod in all_pods(name):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in volume for volume in spec.get("volumes", ()))
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            assert "latest" not in container["image"]
            assert ":" in container["image"].rpartition("/")[2]
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    for account in of(name, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@every
def test_no_secret_is_in_a_file(name: str) -> None:
    """S42."""
    assert not of(name, "Secret")
    for _, pod in all_pods(name):
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", ()):
                assert not (
                    variable.get("value") and ("KEY" in variable["name"] or "TOKEN" in variable["name"])
                )


@every
def test_replicas_are_spread(name: str) -> None:
    """S45."""
    for _, pod in engines(name):
        affinity = pod["spec"]["affinity"]["podAntiAffinity"]
        (term,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
        chosen = term["podAffinityTerm"]["labelSelector"]["matchLabels"]
        assert matches(chosen, pod["metadata"]["labels"])
        assert term["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
        if "penstock.dev/role" not in pod["metadata"]["labels"]:
            (spread,) = pod["spec"]["topologySpreadConstraints"]
            assert spread["topologyKey"] == "topology.kubernetes.io/zone"
            assert spread["whenUnsatisfiable"] == "ScheduleAnyway"


def node_terms(pod: Plain) -> list[list[Plain]]:
    affinity = pod["spec"].get("affinity", {}).get("nodeAffinity")
    if affinity is None:
        return []
    required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    return [term["matchExpressions"] for term in required["nodeSelectorTerms"]]


def test_the_floor_is_never_on_spot_and_the_burst_always() -> None:
    """S35, S62."""
    floor = the("hub", "Deployment", "qwen3-8b")["spec"]["template"]
    burst = the("hub", "Deployment", "qwen3-8b-burst")["spec"]["template"]
    (term,) = node_terms(floor)
    avoided = {each["key"] for each in term if each["operator"] == "NotIn"}
    assert avoided == {"eks.amazonaws.com/capacityType", "karpenter.sh/capacity-type"}
    wanted = [{each["key"] for each in term if each["operator"] == "In"} for term in node_terms(burst)]
    assert {"eks.amazonaws.com/capacityType", "nvidia.com/gpu.product"} in wanted
    assert {"karpenter.sh/capacity-type", "nvidia.com/gpu.product"} in wanted
    (batch,) = [each for each in of("hub", "Deployment") if "bge-m3" in each["metadata"]["name"]]
    assert all(
        any(each["operator"] == "In" and each["values"][0].lower() == "spot" for each in term)
        for term in node_terms(batch["spec"]["template"])
    )
    gateway = the("hub", "Deployment", "gateway")["spec"]["template"]
    assert {each["operator"] for term in node_terms(gateway) for each in term} == {"NotIn"}


def test_tolerations_are_those_of_the_taints() -> None:
    """S33."""
    pod = the("penstock-gpu", "Deployment", "small")["spec"]["template"]["spec"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert {
        "key": "dedicated",
        "operator": "Equal",
        "value": "llm",
        "effect": "NoSchedule",
    } in pod["tolerations"]
    assert pod["nodeSelector"] == {"team": "search"}
    assert "tolerations" not in the("penstock-gpu", "Deployment", "gateway")["spec"]["template"]["spec"]


def test_nodes_of_a_replica_find_one_another() -> None:
    group = the("nodes", "LeaderWorkerSet", "huge-nodes")["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 2
    leader, worker = main(group["leaderTemplate"]), main(group["workerTemplate"])
    for container in (leader, worker):
        assert "--master-addr=$(LWS_LEADER_ADDRESS)" in container["args"]
        assert "--node-rank=$(LWS_WORKER_INDEX)" in container["args"]
        assert "--nnodes=2" in container["args"]
    assert "--headless" in worker["args"]
    assert "--headless" not in leader["args"]
    assert "readinessProbe" not in worker
    assert not of("nodes", "Service", "huge-nodes"), "LeaderWorkerSet makes that one itself"
    service = the("nodes", "Service", "huge")["spec"]["selector"]
    assert service["penstock.dev/role"] == "leader", "a worker answers no requests"


def test_one_model_is_changed_without_the_other() -> None:
    """S73: a model's objects do not hang on what another one has."""
    text = SPECS["hub"]
    other = resolve(loads(text.replace("replicas: 2,", "replicas: 2, flags: {max-num-seqs: 5},")))
    changed = [
        each.key for each, old in zip(objects(other), objects(bundle_of("hub")), strict=True) if each != old
    ]
    assert {name for _, _, name in changed} == {"qwen3-vl", "qwen3-vl-arguments"}


# --- weights


def test_weights_are_fetched_once_and_read_by_all() -> None:
    """S43, S50, S71."""
    claim = the("hub", "PersistentVolumeClaim", "weights")["spec"]
    assert claim["accessModes"] == ["ReadWriteMany"]
    assert claim["storageClassName"] == "efs"
    jobs = [each for each in of("hub", "Job") if each["metadata"]["name"].startswith("weights-")]
    assert len(jobs) == 3
    for job in jobs:
        pod = job["spec"]["template"]
        assert any(each.get("name") == "HF_TOKEN" for each in main(pod)["env"])
        assert main(pod)["command"] == ["penstock", "models", "pull"]
        weights, slug, store = main(pod)["args"]
        (workload,) = {each.weights_path for each in bundle_of("hub").of(slug)}
        assert workload == f"{store.removeprefix('--store=')}/{slug}/current"
        assert weights in {each.weights for each in bundle_of("hub").of(slug)}
    for _, pod in engines("hub"):
        mounts = {each["mountPath"]: each for each in main(pod)["volumeMounts"]}
        assert mounts["/models"]["readOnly"] is True
        assert main(pod)["args"][0].startswith("/models/")
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in main(pod)["env"]
        assert [each["name"] for each in pod["spec"]["initContainers"]] == ["wait-for-weights"]


def test_the_claim_holds_two_versions() -> None:
    size = the("tp4", "PersistentVolumeClaim", "weights")["spec"]["resources"]["requests"]["storage"]
    assert size.endswith("Gi")
    assert int(size[:-2]) * 2**30 >= 2 * bundle_of("tp4").workloads[0].weights_bytes


def test_without_a_shared_volume_each_pod_fetches_for_itself() -> None:
    assert not of("penstock-gpu", "Job")
    assert not of("penstock-gpu", "PersistentVolumeClaim")
    pod = the("penstock-gpu", "Deployment", "small")["spec"]["template"]["spec"]
    assert [each["name"] for each in pod["initContainers"]] == ["fetch-weights"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == "weights"]
    assert "ephemeral" in volume


@every
def test_a_rollout_waits_as_long_as_its_pods_may(name: str) -> None:
    """For weights, and for loading them; else it counts as failed while everything goes as it shall."""
    for each, pod in engines(name):
        workload = next(one for one in bundle_of(name).workloads if one.name == each["metadata"]["name"])
        wait = storage.wait(bundle_of(name), workload)
        assert (wait > 0) == bool(pod["spec"].get("initContainers"))
        if each["kind"] == "Deployment":
            deadline = each["spec"]["progressDeadlineSeconds"]
            assert deadline > wait + workload.load_time + workload.grace
        assert wait == 0 or f"and {wait} s for its weights" in readme.text(bundle_of(name), "plain", "s")


OWN = """
pools: {a: {hardware: A100-80GB}}
models: {m: {weights: /models/own, engine: vllm, pool: a, max_model_len: 4096, flags: {max-num-seqs: 8}}}
cluster: {load_time: 5m, storage: {size: 100GiB%s}}
"""


def test_weights_of_ones_own_are_copied_as_the_readme_shows() -> None:
    bundle = resolve(loads(OWN % ""))
    made = [each.to_dict() for each in objects(bundle)]
    assert not [each for each in made if each["kind"] == "Job"]
    (pod,) = [pod for each in made if each["metadata"]["name"] == "m" for pod in templates(each)]
    (script,) = pod["spec"]["initContainers"][0]["args"]
    assert "Job" not in script
    assert "README.md" in script
    text = readme.text(bundle, "plain", "penstock.yaml")
    assert "at `/models/own` on the claim `weights`" in text
    assert "kubectl -n llm-serving cp MY_FOLDER/. copy-weights:/models/own" in text
    assert not problems(storage.filler(bundle))
    assert "## Copy" not in readme.text(bundle_of("hub"), "plain", "penstock.yaml")


def test_weights_of_ones_own_want_a_volume_that_is_shared() -> None:
    bundle = resolve(loads(OWN % ", access: ReadWriteOnce"))
    with pytest.raises(StartupError, match=r"models.m.weights: /models/own .* ReadWriteOnce"):
        objects(bundle)


def test_the_demo_needs_no_volume() -> None:
    assert "10-weights" not in groups(bundle_of("init"))
    assert "initContainers" not in the("init", "Deployment", "demo")["spec"]["template"]["spec"]


# --- the gateway


def test_sqlite_is_one_pods_and_postgresql_is_shared() -> None:
    alone, many = the("init", "Deployment", "gateway")["spec"], the("hub", "Deployment", "gateway")["spec"]
    assert (alone["replicas"], alone["strategy"]) == (1, {"type": "Recreate"})
    assert the("init", "PersistentVolumeClaim", "gateway-ledger")
    assert many["replicas"] == 2
    assert many["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert not of("hub", "PersistentVolumeClaim", "gateway-ledger")
    variables = {each["name"] for each in main(many["template"])["env"]}
    assert variables >= {
        "PENSTOCK_ENGINE_KEY",
        "PENSTOCK_LEDGER_PASSWORD",
        "CLOUD_API_KEY",
        "PENSTOCK_ADMIN_KEY",
        "METRICS_KEY",
    }


def test_the_admin_api_is_a_port_of_its_own() -> None:
    ports = {each["name"]: each["port"] for each in the("hub", "Service", "gateway")["spec"]["ports"]}
    assert ports == {"http": 8080, "admin": 8081}
    policy = the("hub", "NetworkPolicy", "gateway")["spec"]["ingress"]
    (admin,) = [rule for rule in policy if {"port": "admin"} in rule["ports"]]
    assert admin["from"] == [{"podSelector": {}}], "from this namespace only"


# --- the network


@every
def test_engines_are_reached_by_the_gateway_and_by_monitoring_only(name: str) -> None:
    """S92."""
    policy = the(name, "NetworkPolicy", "engines")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": "http"}]
    gateway, monitoring = rule["from"]
    labels = the(name, "Deployment", "gateway")["spec"]["template"]["metadata"]["labels"]
    assert matches(gateway["podSelector"]["matchLabels"], labels)
    assert monitoring["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    ports = {port["port"] for each in policy["egress"] for port in each["ports"]}
    assert ports == ({53, 443} if name == "penstock-gpu" else {53})


def test_the_entry_waits_for_slow_answers_and_passes_streams_on() -> None:
    """S41."""
    ingress = the("hub", "Ingress", "gateway")
    notes = ingress["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io"
    assert int(notes[f"{prefix}/proxy-read-timeout"]) == patience(bundle_of("hub")) >= 300
    assert notes[f"{prefix}/proxy-buffering"] == "off"
    assert int(notes[f"{prefix}/proxy-body-size"]) == bundle_of("hub").spec.gateway.max_body_bytes
    assert notes["cert-manager.io/cluster-issuer"] == "letsencrypt"
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (rule["host"], path["path"], path["pathType"]) == ("llm.example.com", "/v1", "Prefix")
    assert path["backend"]["service"] == {"name": "gateway", "port": {"name": "http"}}
    assert ingress["spec"]["tls"] == [{"hosts": ["llm.example.com"], "secretName": "gateway-tls"}]


def test_a_route_of_the_gateway_api_has_no_end_of_its_own() -> None:
    elsewhere = loads(SPECS["tp4"].replace("provider: gke", "provider: aks"), "tp4.yaml")
    (route,) = [each.to_dict() for each in objects(resolve(elsewhere)) if each.kind == "HTTPRoute"]
    assert route["spec"]["rules"][0]["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert the("tp4", "Certificate", "gateway-tls")["spec"]["dnsNames"] == ["llm.example.com"]
    grant = the("tp4", "ReferenceGrant", "gateway-tls")["spec"]
    assert grant["from"][0]["namespace"] == "infra"


def test_a_certificate_that_is_there_is_used() -> None:
    ingress = the("penstock-gpu", "Ingress", "gateway")
    assert ingress["spec"]["tls"][0]["secretName"] == "tls"
    assert not any("cert-manager" in key for key in ingress["metadata"]["annotations"])
    assert any("idle_timeout" in value for value in ingress["metadata"]["annotations"].values())


# --- jobs


def test_nightly_work_goes_through_the_gateway() -> None:
    """S36."""
    cron = the("hub", "CronJob", "reindex")["spec"]
    assert (cron["schedule"], cron["timeZone"], cron["concurrencyPolicy"]) == (
        "0 2 * * *",
        "Etc/UTC",
        "Forbid",
    )
    (once,) = [each["spec"] for each in of("hub", "Job") if each["metadata"]["name"].startswith("once-")]
    for pod in (cron["jobTemplate"]["spec"]["template"], once["template"]):
        container = main(pod)
        assert container["command"] == ["penstock", "batch"]
        assert "--url=http://gateway.llm-serving.svc:8080/v1" in container["args"]
        assert "--background" in container["args"]  # S35: what the gateway tells engines, which all heed it
        (key,) = [each for each in container["env"] if each["name"] == "PENSTOCK_API_KEY"]
        assert key["valueFrom"]["secretKeyRef"] == {"name": "reindex-key", "key": "key"}
    assert once["activeDeadlineSeconds"] == 6 * 3600


def test_a_job_that_is_changed_is_another_job() -> None:
    """Its pods' template cannot be changed: applying it under the same name would fail."""

    def named(text: str) -> str:
        made = (each.to_dict() for each in objects(resolve(loads(text))))
        (job,) = [each for each in made if each["kind"] == "Job"]
        assert "ttlSecondsAfterFinished" not in job["spec"], "gone, it would be done again"
        return str(job["metadata"]["name"])

    text = """
pools: {a: {}}
models: {m: {weights: demo, pool: a}}
jobs: {once: {input: /data/a.jsonl, output: /data/b.jsonl, volume: v, key_secret: k}}
"""
    assert named(text) == named(text)
    assert named(text).startswith("once-")
    assert (
        len({named(text), named(text.replace("b.jsonl", "c.jsonl")), named(text + "cluster: {drain: 9}")})
        == 2
    )
    other = "cluster: {images: {penstock: 'penstock:2'}}"
    assert named(text) != named(text + other)
