"""Kubeflow component: evaluation losses and validation pictures."""

from components.evaluate.component import evaluate

__all__ = ["evaluate"]
