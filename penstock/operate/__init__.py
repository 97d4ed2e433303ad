"""Operating what runs: weights of models on a disk, rollouts between them, bundles in a cluster, nodes.

    models/    the store: one folder of weights, with checksums, snapshots and a way back
    rollout/   a model's requests move to another one, step by step, while both are watched
    apply/     a bundle goes to a cluster, and what keeps its pods from starting is said
    node/      what a machine has of what an engine needs

It knows gateways by their admin API, clusters by kubectl, and no engine.
"""
