"""From a block of counts to latents and labels."""
