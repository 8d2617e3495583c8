"""Records in, Arrow shards of packed sequences out. Imports neither torch nor Ray."""
