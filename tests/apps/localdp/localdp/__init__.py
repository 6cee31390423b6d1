"""localdp: A Flower / PyTorch app."""
