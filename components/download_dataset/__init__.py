"""Kubeflow component: fetch pictures and captions."""

from components.download_dataset.component import download_dataset

__all__ = ["download_dataset"]
