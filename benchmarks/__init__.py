"""What scviaduct costs, measured side by side, with the machine it was measured on."""
