"""From the config of ``attack.py`` to what is attacked, with which images, and what came of it."""
