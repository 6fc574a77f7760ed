"""Hugging Face models: which families exist, and how masks are attached to them."""
