"""A packed model on a GPU: its records in the host's memory, the GPU's as their cache.

The CPU engine's counterpart: the same stores, methods, caches and counts, another device.
"""
