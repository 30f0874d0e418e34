"""What leaves the machine: model card, evaluation results, the push to the Hub."""
