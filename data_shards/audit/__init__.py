"""What is in the data: figures, findings, and how they are shown."""
