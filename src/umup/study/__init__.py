"""Experiments: a plan of runs, the runs, and a frozen result that the command line prints and plots draw."""
