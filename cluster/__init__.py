"""Starts attempts on workers (Ray Train or local processes) and decides what follows when one ends."""
