"""Where query cells come from, cut into shards."""
