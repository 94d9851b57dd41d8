"""How work meets machines: connecting and dispatch."""
