"""Which reference or family suits a query: a decision tree walked on its data."""
