"""The training loop; start reading in :mod:`kubetuner.training.loop`."""
