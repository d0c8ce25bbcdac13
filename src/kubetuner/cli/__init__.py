"""The ``kubetuner`` command."""
