"""What is kept of images: decoded pixels, and what frozen parts make of them."""
