"""The end that asks: a placement behind a server, tries and what is known of the way there."""
