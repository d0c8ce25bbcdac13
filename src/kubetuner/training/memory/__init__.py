"""Memory of training: predicted before a GPU is asked for, and measured while it runs."""
