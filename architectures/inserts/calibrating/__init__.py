"""What is measured of trained weights: the range of codes, and BatchNorm."""
