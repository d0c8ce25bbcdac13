"""Kubeflow component: check the configuration and work out one section per step."""

from components.plan.component import plan

__all__ = ["plan"]
