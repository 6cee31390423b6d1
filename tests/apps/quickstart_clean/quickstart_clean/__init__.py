"""quickstart_clean: A Flower / PyTorch app."""
