"""secagg_clean: A Flower / PyTorch app."""
