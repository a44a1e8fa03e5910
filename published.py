"""The published models: the download page of each. No plain address of any is known, so no program can fetch them."""

PAGES = {
    "VTN-3-liver": "https://drive.google.com/open?id=1uLb0mNxgvwWMxzNKvF1xVnnbgLlCjEfU",
    "VTN-10-liver": "https://drive.google.com/open?id=1ECGIXccx2vhybrWff7DWW6keAjilEZcT",
    "VoxelMorph-5-liver": "https://drive.google.com/open?id=1-p4AHHZKoMDIIg6Be5RK3h9QOeVpOPTA",
    "VTN-3-brain": "https://drive.google.com/open?id=14wFJZMnkk2SQXcWH3LQBxQJZhLWvsV3n",
    "VTN-10-brain": "https://drive.google.com/open?id=1bvHG_g5NRS6Ek6aNEgMb9bIfYaCk62Mp",
    "VoxelMorph-5-brain": "https://drive.google.com/open?id=1oSiHE2G4R5SuYtt6FVu_ayQ_t9UN3HgB",
}


def where_to_get(name: str, root: str) -> str:
    """A sentence: the page of a published model, and where to unzip what it gives."""
    return (
        f"download it in a browser from {PAGES[name]} and unzip it into {root}/, so that "
        f"{root}/{name}/model-<step>.index is there"
    )
