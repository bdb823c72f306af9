"""``sparsify``, and the pieces that sparse methods are made of."""
