"""Text to batches: corpus (which files), tokenizer, tokens (memory-mapped ids), batches. numpy only, no torch."""
