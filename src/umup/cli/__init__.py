"""The command line: main.py maps a command to its module, one file each; parse, call once, print."""
