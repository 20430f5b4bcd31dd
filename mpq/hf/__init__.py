"""Checkpoints of quantized models as the Hugging Face ecosystem keeps them: containers, folders, and the way back."""
