"""What is fitted on text: thresholds, static masks, the split between DIP's two masks."""
