"""One module per scaled op: it owns the parameters and the plan's floats, and its forward is one call into ops."""
