"""The command line: configuration and one small module per verb."""
