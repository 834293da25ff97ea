"""The product: parametrizations as tables. Pure data and arithmetic, standard library only."""
