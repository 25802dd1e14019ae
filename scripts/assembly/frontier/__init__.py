"""From the config of ``privacy_frontier.py`` to a grid of points, each trained, tested and attacked."""
