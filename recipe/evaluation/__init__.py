"""Stage 3: a model and test records go in, answers, scores and a report come out."""
