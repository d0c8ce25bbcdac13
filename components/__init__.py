"""Kubeflow components: one folder each, a thin face on a function of ``kubetuner.steps``."""
