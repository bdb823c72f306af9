"""Data sets: loading, streaming, augmenting and corrupting them."""
