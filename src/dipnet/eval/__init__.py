"""Measuring a model on text: perplexity, the texts, reports and plots. Fits nothing."""
