"""Cerebras model-zoo configs, SP and muP, in both layouts. Loads without torch."""
