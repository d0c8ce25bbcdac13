"""Kubeflow component: train the denoiser or a LoRA."""

from components.train.component import train

__all__ = ["train"]
