"""What a person starts: one module a run, and the command line."""
