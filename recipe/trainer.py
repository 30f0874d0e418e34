"""The trainer's public address."""

from recipe.training.trainer import InstructionTrainer

__all__ = ["InstructionTrainer"]
