"""Imported by the tests' fork server: what libraries build at first use, so that no worker has to."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")
