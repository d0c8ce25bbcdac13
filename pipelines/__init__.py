"""The kfp pipeline, its local runner and recipes."""
