"""Codecs: from features and images to bytes and back."""
