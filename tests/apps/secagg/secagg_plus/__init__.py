"""secagg: A Flower / PyTorch app."""
