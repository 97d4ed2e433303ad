"""Words that a field of Kubernetes may hold.

The published schemas have them in their descriptions only; what refuses others is the API server's
validation (k8s.io/api/*/types.go, k8s.io/kubernetes/pkg/apis/*/validation).

A word that a later version brings is allowed in all: it is not what is misspelt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PROTOCOLS = "TCP UDP SCTP"
_OPERATORS = "In NotIn Exists DoesNotExist"
_RESTARTS = "Always OnFailure Never"
_PULLS = "Always IfNotPresent Never"
_ACCESS = "ReadWriteOnce ReadOnlyMany ReadWriteMany ReadWriteOncePod"
_MODES = "Filesystem Block"
_MESSAGES = "File FallbackToLogsOnError"
_EFFECTS = "NoSchedule PreferNoSchedule NoExecute"

_CONTAINER = {
    "imagePullPolicy": _PULLS,
    "restartPolicy": _RESTARTS,
    "terminationMessagePolicy": _MESSAGES,
}

_WORDS: Mapping[str, Mapping[str, str]] = {
    "apps.v1.DeploymentStrategy": {"type": "Recreate RollingUpdate"},
    "apps.v1.StatefulSetUpdateStrategy": {"type": "RollingUpdate OnDelete"},
    "apps.v1.DaemonSetUpdateStrategy": {"type": "RollingUpdate OnDelete"},
    "apps.v1.StatefulSetSpec": {"podManagementPolicy": "OrderedReady Parallel"},
    "apps.v1.StatefulSetPersistentVolumeClaimRetentionPolicy": {
        "whenDeleted": "Retain Delete",
        "whenScaled": "Retain Delete",
    },
    "autoscaling.v2.MetricSpec": {"type": "ContainerResource External Object Pods Resource"},
    "autoscaling.v2.MetricTarget": {"type": "Utilization Value AverageValue"},
    "autoscaling.v2.HPAScalingPolicy": {"type": "Pods Percent"},
    "autoscaling.v2.HPAScalingRules": {"selectPolicy": "Max Min Disabled"},
    "batch.v1.CronJobSpec": {"concurrencyPolicy": "Allow Forbid Replace"},
    "batch.v1.JobSpec": {
        "completionMode": "NonIndexed Indexed",
        "podReplacementPolicy": "TerminatingOrFailed Failed",
    },
    "batch.v1.PodFailurePolicyRule": {"action": "FailJob FailIndex Ignore Count"},
    "batch.v1.PodFailurePolicyOnExitCodesRequirement": {"operator": "In NotIn"},
    "core.v1.Container": _CONTAINER,
    "core.v1.EphemeralContainer": _CONTAINER,
    "core.v1.ContainerPort": {"protocol": _PROTOCOLS},
    "core.v1.HTTPGetAction": {"scheme": "HTTP HTTPS"},
    "core.v1.HostPathVolumeSource": {
        "type": "DirectoryOrCreate Directory FileOrCreate File Socket CharDevice BlockDevice"
    },
    "core.v1.NodeSelectorRequirement": {"operator": f"{_OPERATORS} Gt Lt"},
    "core.v1.PersistentVolumeClaimSpec": {"accessModes": _ACCESS, "volumeMode": _MODES},
    "core.v1.PersistentVolumeSpec": {
        "accessModes": _ACCESS,
        "volumeMode": _MODES,
        "persistentVolumeReclaimPolicy": "Retain Delete Recycle",
    },
    "core.v1.PodSecurityContext": {
        "fsGroupChangePolicy": "OnRootMismatch Always",
        "supplementalGroupsPolicy": "Merge Strict",
    },
    "core.v1.PodSpec": {
        "dnsPolicy": "ClusterFirst ClusterFirstWithHostNet Default None",
        "preemptionPolicy": "PreemptLowerPriority Never",
        "restartPolicy": _RESTARTS,
    },
    "core.v1.SeccompProfile": {"type": "RuntimeDefault Localhost Unconfined"},
    "core.v1.AppArmorProfile": {"type": "RuntimeDefault Localhost Unconfined"},
    "core.v1.ScopedResourceSelectorRequirement": {"operator": _OPERATORS},
    "core.v1.ServicePort": {"protocol": _PROTOCOLS},
    "core.v1.ServiceSpec": {
        "externalTrafficPolicy": "Cluster Local",
        "internalTrafficPolicy": "Cluster Local",
        "ipFamilies": "IPv4 IPv6",
        "ipFamilyPolicy": "SingleStack PreferDualStack RequireDualStack",
        "sessionAffinity": "ClientIP None",
        "type": "ClusterIP NodePort LoadBalancer ExternalName",
    },
    "core.v1.Taint": {"effect": _EFFECTS},
    "core.v1.Toleration": {"effect": _EFFECTS, "operator": "Exists Equal Lt Gt"},
    "core.v1.TopologySpreadConstraint": {
        "nodeAffinityPolicy": "Honor Ignore",
        "nodeTaintsPolicy": "Honor Ignore",
        "whenUnsatisfiable": "DoNotSchedule ScheduleAnyway",
    },
    "core.v1.VolumeMount": {
        "mountPropagation": "None HostToContainer Bidirectional",
        "recursiveReadOnly": "Disabled IfPossible Enabled",
    },
    "meta.v1.LabelSelectorRequirement": {"operator": _OPERATORS},
    "networking.v1.HTTPIngressPath": {"pathType": "Exact Prefix ImplementationSpecific"},
    "networking.v1.NetworkPolicyPort": {"protocol": _PROTOCOLS},
    "networking.v1.NetworkPolicySpec": {"policyTypes": "Ingress Egress"},
    "policy.v1.PodDisruptionBudgetSpec": {"unhealthyPodEvictionPolicy": "IfHealthyBudget AlwaysAllow"},
    "rbac.v1.RoleRef": {"kind": "Role ClusterRole"},
    "rbac.v1.Subject": {"kind": "User Group ServiceAccount"},
    "scheduling.v1.PriorityClass": {"preemptionPolicy": "PreemptLowerPriority Never"},
    "storage.v1.StorageClass": {
        "reclaimPolicy": "Retain Delete",
        "volumeBindingMode": "Immediate WaitForFirstConsumer",
    },
}
"""Group, version and name of a type → field → its words. A field that is a list has them as items."""


def tighten(definitions: Mapping[str, Any]) -> None:
    """Write the words into schemas, whose names end as the types' here do (`io.k8s.api.core.v1.Toleration`).

    Nothing and an empty text stay allowed: the API server takes the default.
    """
    for name, schema in definitions.items():
        for field, words in _WORDS.get(".".join(name.split(".")[-3:]), {}).items():
            found = schema.get("properties", {}).get(field)
            if found is None:
                continue  # an older version
            target = found["items"] if isinstance(found.get("items"), dict) else found
            target["enum"] = [*words.split(), "", None]
