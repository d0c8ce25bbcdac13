"""Training on several machines: a TrainJob of Kubeflow Trainer; start reading in :mod:`kubetuner.trainjob.follow`."""
