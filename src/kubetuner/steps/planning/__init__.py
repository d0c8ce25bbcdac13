"""What `plan` finds out: one part of it each; start reading in :mod:`kubetuner.steps.plan`."""
