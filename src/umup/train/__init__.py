"""Training: config -> run directory."""
