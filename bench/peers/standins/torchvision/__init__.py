"""A stand-in for torchvision: only what caching and training with SimpleTuner and diffusers' examples call."""

from torchvision import transforms as transforms
