"""Kubeflow component: the shard numbers that the cache steps fan out over."""

from components.split.component import split

__all__ = ["split"]
