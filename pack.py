"""Keep the weights of a trained run alone, in half their size: python pack.py -c RUN -o weights/NAME

What is written is a run to evaluate and to finetune; it cannot be continued, as it has no state of the optimizer.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import cli
import files
import start
from errors import UserError, listed
from network import runs

PACKED = re.compile(rf"{re.escape(runs.ARGS_FILE)}|{re.escape(runs.CONFIG_FILE)}|model-\d+\..+")  # what is written


def build_parser() -> argparse.ArgumentParser:
    """The flags of pack.py."""
    flags = cli.parser("Write a run with the weights of a checkpoint alone, as float16.")
    flags.add_argument("-c", "--checkpoint", required=True, help="run: FOLDER, FOLDER:STEP, FOLDER:best or its name")
    flags.add_argument("-o", "--output", required=True, help="folder to make, such as weights/mine")
    flags.add_argument("--overwrite", action="store_true", help="replace a folder that this command made")
    return flags


def check_replaced(output: Path, overwrite: bool) -> None:
    """See that what is there may be replaced: a folder of weights alone, as this command makes it.

    Raises:
        UserError: it may not be.
    """
    if not overwrite:
        raise UserError(f"{output} is there already; choose another name with -o, or replace it with --overwrite")
    if not output.is_dir():
        raise UserError(f"-o {output} is a file; name a folder")
    foreign = sorted(path.name for path in output.iterdir() if not PACKED.fullmatch(path.name))
    if foreign:
        raise UserError(
            f"-o {output} has files that were not written by this command: {listed(foreign, 3)}; name another folder"
        )


def main(arguments: list[str] | None = None) -> None:
    """Pack the run that the flags name.

    Raises:
        UserError: there is no such run, it cannot be read, or the folder is there already and not to be
            replaced, or cannot be written.
    """
    args = build_parser().parse_args(arguments)
    source, output = runs.find_checkpoint(args.checkpoint), Path(args.output)
    if output.exists():
        check_replaced(output, args.overwrite)
    if output.resolve() == source.parent.resolve():
        raise UserError(f"-o {output} is the run itself; choose another name")
    start.tensorflow()
    from network.checkpoints import save_weights

    with files.writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.partial_folder(output.parent) as partial:
            packed = partial / "run"
            packed.mkdir()
            with start.quietly():  # TensorFlow remarks that some processors compute slowly with float16
                save_weights(source, packed)
            for name in (runs.ARGS_FILE, runs.CONFIG_FILE):
                if (source.parent / name).is_file():
                    shutil.copyfile(source.parent / name, packed / name)
            if output.exists():
                files.replace_folder(packed, output)
            else:
                files.publish(packed, output)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    print(f"{output}: the weights of {source}, {size:.1f} MB")


if __name__ == "__main__":
    sys.exit(cli.run(main))
