"""Results -> figures. matplotlib loads inside; every figure has its numbers in a CSV beside it."""
