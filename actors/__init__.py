"""Ray shells around the science: thin, and without science of their own."""
