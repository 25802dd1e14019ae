"""The one network: stages of a backbone, inserts behind its cuts, and what it computes by name."""
