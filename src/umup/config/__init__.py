"""Run configs: one strict pydantic class per section, YAML and dotted overrides. Loads without torch."""
