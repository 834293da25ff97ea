"""Scaled operations: plain torch, plain floats. Nothing here knows a role, a table or a config.

Arrays may carry leading axes; where parameters have one (a model axis for stacked sweeps) it comes first in every
argument. No size is taken from a batch at run time: token counts are inside the floats, which come from the plan.
"""
