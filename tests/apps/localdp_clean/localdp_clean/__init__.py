"""localdp_clean: A Flower / PyTorch app."""
