"""Roles, plans and unit scaling for any nn.Module."""
