"""Plans of where to cut a network, as tables and plots."""
