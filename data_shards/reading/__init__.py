"""Random access to the packs of a prepared dataset, on this machine or fetched from a store."""
