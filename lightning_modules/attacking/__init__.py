"""The adversary: what reaches it, and how it learns to rebuild images."""
