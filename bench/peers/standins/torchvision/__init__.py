"""A stand-in for torchvision: only what caching and training with SimpleTuner call."""

from torchvision import transforms as transforms
