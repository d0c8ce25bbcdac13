"""Noise processes and losses: pure tensor maths, no models."""
