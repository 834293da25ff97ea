"""Text from a run: generate.py knows ids, completion.py knows text."""
