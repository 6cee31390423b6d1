"""Defenses, one file each: what a client does to its batch, gradient or update before it sends."""
