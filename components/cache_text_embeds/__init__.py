"""Kubeflow component: encode captions and prompts, once each."""

from components.cache_text_embeds.component import cache_text_embeds

__all__ = ["cache_text_embeds"]
