"""Scripts that train the two demo models bundled with dipnet."""
