"""A bundle goes to a cluster, and what keeps its pods from starting is said in words.

DIR ─▶ objects, in the order in which they need each other ─▶ `penstock check` ─▶ kubectl, server-side
    ─▶ rollouts are watched ─┬─ all ready ─▶ done
                             └─ not yet: pods, events, claims, quotas ─▶ why, and what to do ─▶ deadline

bundle     files as objects, and their order
kubectl    the only way to the cluster: its contexts, credentials and plugins are the user's own
rollout    whether what was applied is ready: pure
reasons    why it is not: pure
run        all of them, until the deadline
"""
