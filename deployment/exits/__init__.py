"""Exits: the policies by which samples leave early, and what a bundle says of them."""
