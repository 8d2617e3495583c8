"""Which row comes when: pure functions with random access."""
