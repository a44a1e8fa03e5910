"""The settings of an evaluation: what its records and its report are of. They are kept in both, as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any

from checked import INDEX, build

# Reports and records written before `values` was kept with them: their values with one number per label.
_PER_LABEL_BEFORE = ("dice", "jaccard", "hd95", "surface_distance", "hd95_mm", "surface_distance_mm")
# What may differ between two evaluations of the same thing.
_INCIDENTAL = ("weights", "written", "batch", "figures", "versions")


@dataclasses.dataclass(frozen=True)
class Value:
    """What a measured value is.

    Attributes:
        unit: 'voxel', 'mm', '' for a number without a unit, ...
        per: 'pair', 'label' or 'landmark': there is one number for each.
        better: 'higher' or 'lower' where that means a better registration, else None.
    """

    unit: str = ""
    per: str = "pair"
    better: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is evaluated, and how. Old files, which lack the fields that have a default, are read as well.

    Attributes:
        report: name of the report, without folder and ending.
        checkpoint: run and step of the network.
        dataset: path of the dataset config.
        scheme: the scheme of the config.
        paired: whether its pairs are those of neighbouring scans.
        pairs: number of pairs.
        batch: pairs that are registered at a time.
        network: the options of the network.
        rep: how often each deformable cascade is applied, or 'auto'.
        refine: steps of refinement.
        labels: name -> value in the segmentations; None where these are masks.
        metrics: names of the metrics.
        per_cascade: whether every cascade is measured.
        save: what is saved of every pair.
        save_format: 'nii' or 'npz'.
        figures: number of pairs that are drawn.
        versions: package -> version of what the numbers may depend on.
        weights: hash of the checkpoint's content; None in old files.
        written: when the checkpoint file was written, in seconds. Files without `weights` tell a checkpoint by it.
        values: name -> what that value is; empty in old files.
        affine: kind of the affine map that is found before the network, or 'none'.
    """

    report: str
    checkpoint: str
    dataset: str
    scheme: str
    paired: bool
    pairs: Annotated[int, INDEX]
    batch: int
    network: Mapping[str, Any]
    rep: int | str
    refine: int
    labels: Mapping[str, int] | None
    metrics: tuple[str, ...]
    per_cascade: bool
    save: tuple[str, ...]
    save_format: str
    figures: int
    versions: Mapping[str, str]
    weights: str | None = None
    written: float | None = None
    values: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    affine: str = "none"

    def per(self, name: str) -> str:
        """What a value has one number for: 'pair', 'label' or 'landmark'."""
        if name in self.values:
            return self.values[name].per
        return "label" if not self.values and name in _PER_LABEL_BEFORE else "pair"

    def to_dict(self) -> dict[str, Any]:
        """All settings, as they come back from JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Any, where: str, remedy: str) -> "Settings":
        """Settings from what a JSON file holds.

        Args:
            values: what it holds.
            where: the file, for messages.
            remedy: what to do where they are not settings.

        Raises:
            UserError: it is no object, lacks a setting, or one is not of its type.
        """
        return build(cls, values, where, remedy)

    def difference(self, other: "Settings", incidental: bool = True) -> str | None:
        """The first thing that is not the same in other settings, as a text "key this, not other"; None without any.

        Patch versions of Python count as the same. The weights are compared by their hash; where old settings lack it,
        by the time when the checkpoint was written.

        Args:
            other: the settings to compare with.
            incidental: whether what may differ between two evaluations of the same thing counts: the weights, the
                batch, the figures and the versions.
        """
        ours, others = self._compared(incidental), other._compared(incidental)
        if not incidental:
            return _difference(ours, others)
        if self.weights and other.weights:
            del ours["written"], others["written"]
        else:
            del ours["weights"], others["weights"]
            times = ours.pop("written"), others.pop("written")
            if times[0] != times[1]:
                return (
                    f"a checkpoint written at {times[0]}, not {times[1]} (seconds since 1970; it was kept before "
                    "weights were known by a hash)"
                )
        return _difference(ours, others)

    def _compared(self, incidental: bool) -> dict[str, Any]:
        """The settings that say what is evaluated; `values` follows from `metrics`."""
        settings = self.to_dict()
        del settings["values"]
        if "python" in settings["versions"]:
            settings["versions"]["python"] = ".".join(settings["versions"]["python"].split(".")[:2])
        return settings if incidental else {name: v for name, v in settings.items() if name not in _INCIDENTAL}


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first entry in which two mappings differ, as a text "key old, not new"; None where there is none."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            different = _difference(before, after, f"{prefix}{key}.")
        else:
            different = f"{prefix}{key} {before!r}, not {after!r}" if before != after else None
        if different:
            return different
    return None
