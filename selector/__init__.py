"""Gradient-based data selection for post-training."""
