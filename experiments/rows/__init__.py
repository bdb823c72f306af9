"""Rows of results, and the pages that are made of them."""
