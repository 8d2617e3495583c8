"""Sequences to packs, shards and the receipts that make preparing resumable."""
