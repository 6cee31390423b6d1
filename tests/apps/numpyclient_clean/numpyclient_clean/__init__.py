"""numpyclient_clean: A Flower / PyTorch app."""
