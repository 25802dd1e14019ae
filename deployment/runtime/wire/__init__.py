"""What both ends of a connection speak: the protocol, tensors, signatures and statuses."""
