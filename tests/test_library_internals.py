"""Private corners of libraries that the recipe uses, each in one function: a release that changes one fails here."""

from datasets import Dataset

# --- recipe.attention -----------------------------------------------------------------------------------------------

# --- recipe.data ----------------------------------------------------------------------------------------------------


def test_datasets_names_its_records_by_a_fingerprint():
    """`recipe.data.encode` names its cache by it: it must change with the records, and with nothing else."""
    texts = {"text": ["a", "b", "c"]}
    first, again = (Dataset.from_dict(texts) for _ in range(2))
    assert isinstance(first._fingerprint, str) and first._fingerprint == again._fingerprint
    assert first._fingerprint != first.select([0, 2])._fingerprint
    assert first.map(lambda row: row, new_fingerprint="named")._fingerprint == "named"


# --- recipe.evaluation ----------------------------------------------------------------------------------------------

# --- recipe.generation ----------------------------------------------------------------------------------------------

# --- recipe.model ---------------------------------------------------------------------------------------------------

# --- recipe.templates -----------------------------------------------------------------------------------------------

# --- recipe.training ------------------------------------------------------------------------------------------------
