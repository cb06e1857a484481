"""Text to token ids and source latents, and back."""
