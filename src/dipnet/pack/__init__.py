"""Pack a checkpoint into a store: one slab of one matrix at a time, never the whole model."""
