"""What the server of bundles is made of: models, batches, handlers, streams, and what goes on to others."""
