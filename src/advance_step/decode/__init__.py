"""Paged decoding of Hugging Face causal LMs, each step advanced in place by `advance_until_stop`."""
