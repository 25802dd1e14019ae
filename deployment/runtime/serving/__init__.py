"""What the server of bundles and its client are made of: the protocol, models, batches, trust, and the way there."""
