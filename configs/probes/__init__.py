"""Probes: tasks in which what the cache keeps is all that counts (mla/probes.py)."""
