"""Getting models from the hub, a bucket, the web or a folder; finding them."""
