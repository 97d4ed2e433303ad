"""From a spec to the files that run it: Kubernetes, Compose, systemd. Texts only; nothing is started.

    Spec ─▶ resolve (what hangs on models, devices and providers is decided) ─▶ Bundle
         ─▶ objects (typed, one module for each subject) ─▶ files (plain, kustomize, Helm; Compose; systemd)

It knows the catalogues of `fleet` and the metric names of `observe`. Whether the result is right is not its
word but that of `penstock.check`.
"""
