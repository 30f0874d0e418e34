"""Instruction fine-tuning of GPT-2-class models with Hugging Face parts. Import the modules; this file stays empty."""

__version__ = "0.1.0"
