"""Galleries to search: their files, and the index that is made of them."""
