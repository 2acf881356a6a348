"""Batches: many models and recipes in one queue."""
