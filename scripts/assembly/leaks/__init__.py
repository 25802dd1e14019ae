"""What leaks beside the image itself: an attribute behind the payload, and who was in training."""
