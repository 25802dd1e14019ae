"""What a bundle is asked, by whom, and what becomes of the answers."""
