"""The command `advance-step generate`: files of prompts in, files of texts out.

It knows decode; decode knows nothing of it.
"""
