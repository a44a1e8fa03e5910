"""Register two raw scans: python demo.py -c weights/VTN-10-liver -f fixed_folder -m moving.nii.gz -o output

As register.py, with the flags of the original's demo and with its output: pictures and DICOM series after each cascade.
"""

import argparse
import sys

import cli
import register
from errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The flags of demo.py."""
    flags = cli.parser("Register two raw scans: DICOM or NIfTI in, the warped scan and its displacement field out.")
    flags.add_argument("-f", "--fixed", default=None, help="fixed scan: folder of a DICOM series, or NIfTI, NRRD, MHA")
    flags.add_argument("-m", "--moving", default=None, help="moving scan, likewise")
    register.add_flags(flags)
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Register the pair and write everything into a folder, which appears when it is complete.

    Args:
        arguments: flags; those of the process where None.

    Raises:
        UserError: a scan is not named, and what `register.run` raises.
    """
    from data_util.output import registration_files

    args = cli.parse(build_parser(), arguments)
    for flag in ("fixed", "moving"):
        if getattr(args, flag) is None:
            raise UserError(f"--{flag} is missing; python demo.py -c RUN -f FIXED -m MOVING -o OUTPUT")
    register.run(args, registration_files.write_original)


if __name__ == "__main__":
    sys.exit(cli.run(main, if_out_of_memory=register.IF_OUT_OF_MEMORY))
