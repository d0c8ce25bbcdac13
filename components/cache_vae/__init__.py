"""Kubeflow component: encode pictures with the VAE, once each."""

from components.cache_vae.component import cache_vae

__all__ = ["cache_vae"]
