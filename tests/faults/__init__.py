"""Faults that runs must survive: a catalogue, what injects each into a real run, the table that tells how it went."""
