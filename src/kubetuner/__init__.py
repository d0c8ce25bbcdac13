"""Fine-tune diffusion models on Kubeflow, from SimpleTuner's two JSON files."""

__version__ = "0.1.0"
