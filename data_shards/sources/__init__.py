"""Sources of records: files found, cut into batches, and read as records."""
