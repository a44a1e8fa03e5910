"""How the scans of a pair are seen: as the user asks, else as the run was trained, else by what the scans are."""

from pathlib import Path

import SimpleITK as sitk

from data_util.config import load_dataset_config
from data_util.scans.automatic_view import automatic_view, modality_of
from data_util.scans.view import PRESETS, View


def run_view(folder: Path) -> View:
    """How the network of a run sees scans, as far as the run knows.

    A run keeps it in its config.json. One that does not (a published run, for instance) names the data config that it
    was trained on, which may be here and tell.

    Args:
        folder: the run.

    Raises:
        UserError: a file of the run is damaged.
    """
    from network import runs

    values = runs.load_data(folder)
    if values is not None:
        return View.from_dict(values, Path(folder) / runs.CONFIG_FILE)
    dataset = runs.load_args(folder).dataset
    if dataset is None or not Path(dataset).is_file():
        return View()
    return load_dataset_config(dataset).view


def choose_view(
    asked: View | str | None, known: View, has_run: bool, fixed: sitk.Image, moving: sitk.Image
) -> tuple[View, list[str], list[str]]:
    """The view to take: what the user asks for, completed by what the run knows, completed by what the scans are.

    Args:
        asked: a view, the name of one of `PRESETS`, or None.
        known: what the run knows.
        has_run: whether there is one.
        fixed, moving: the scans, in LPS.

    Returns:
        The `View`, sentences on what was chosen because nobody said it, and doubts about it.
    """
    chosen, remarks = [], []
    view = PRESETS[asked] if isinstance(asked, str) else asked or View()
    if view.crop is None:
        view = view.completed(known)
    if view.crop is None and not has_run:
        automatic, sentence = automatic_view(fixed, moving)
        view = view.completed(automatic)
        chosen.append(sentence)
    elif view.crop is None:
        view = view.completed(PRESETS["liver"])
        remarks.append(
            "the run does not say what its volumes show, so the scans were prepared as livers; if that is wrong, "
            "say it with --preprocess"
        )
    if view.window is None and view.percentiles is None and view.crop in PRESETS:
        view = view.completed(PRESETS[view.crop])
    view = view.completed(View(orientation=known.orientation))
    if view.orientation is None and has_run:
        remarks.append(
            "the run does not say where the axes of its volumes run to, so they were taken as LPS; if that is wrong, "
            "say it with --orientation (RPI for the published liver models)"
        )
    if has_run:
        for role, scan in (("fixed", fixed), ("moving", moving)):
            remarks += [f"the {role} scan {unlike}" for unlike in _unlike(known, modality_of(scan))]
    return view.completed(View(orientation="LPS")), chosen, remarks


def _unlike(known: View, modality: str | None) -> list[str]:
    """How a scan differs from those that a run was trained on, where both are known to be of one kind."""
    if known.percentiles and modality == "CT":
        return [
            "is a CT, but the model knows scans scaled by percentiles, as MR is: expect little if it never saw a CT"
        ]
    if known.window and modality not in ("CT", None):
        return [f"is {modality}, but the model knows scans in a window of Hounsfield units, as CT is: expect little"]
    return []
