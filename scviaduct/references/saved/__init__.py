"""What scvi-tools saved, read without running anything in it, repaired, and rewritten without pickles."""
