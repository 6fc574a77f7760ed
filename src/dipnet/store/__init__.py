"""A packed model on disk: its index, its records, their checksums. Knows no model library."""
