"""numpyclient: A Flower / PyTorch app."""
