"""Writing a bundle: the export, its parity gate, and what neither may carry along."""
