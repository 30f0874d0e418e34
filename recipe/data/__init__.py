"""Stage 1: records go in, tokens come out.

sources (files and Hub) -> records (validated) -> split -> encode (template and tokenizer); duplicates and inspection
show what is in records before anything is trained on them.
"""

from recipe.data.encode import encode_records, load_splits, template_overhead, token_statistics
from recipe.data.split import load_records

__all__ = ["encode_records", "load_records", "load_splits", "template_overhead", "token_statistics"]
