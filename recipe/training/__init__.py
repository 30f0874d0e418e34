"""Stage 2: tokens and a base model go in, a tuned model comes out."""
