"""Ranks, meshes, sharding, checkpoints, failures."""
