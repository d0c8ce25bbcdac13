"""Ready recipes for the pipelines."""
