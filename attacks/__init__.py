"""Attacks: one file each, the paper's algorithm on one screen."""
