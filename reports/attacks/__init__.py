"""What adversaries recover of images: figures with intervals, tables, pictures."""
