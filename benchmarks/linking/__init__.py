"""What benchmarks/code_links.py is made of."""
