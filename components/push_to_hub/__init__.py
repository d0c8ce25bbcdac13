"""Kubeflow component: publish the model with its card."""

from components.push_to_hub.component import push_to_hub

__all__ = ["push_to_hub"]
