"""Instruction fine-tuning of GPT-2-class models with Hugging Face parts. Import its modules; this file imports none."""

__version__ = "0.1.0"
