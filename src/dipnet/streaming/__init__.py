"""Decode a packed model from disk inside a memory budget; the same model object as ever outside."""
