"""Where to get a published model: python -m data_util.download VTN-10-liver

The published models lie behind download pages, which a person has to open: no plain address or checksum of them is
known. So this says the page and the place, or that the model is there already.
"""

import argparse
import sys
from pathlib import Path

from cli import run
from errors import UserError
from published import PAGES, where_to_get


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: the model is not there; the message says where to get it. Or nobody knows it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_util.download", description="Say where to get a published model, and where to put it."
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(PAGES))
    parser.add_argument("-o", "--output", default="weights", help="folder of trained models (%(default)s)")
    args = parser.parse_args(argv)
    folder = Path(args.output) / args.name
    if any(folder.glob("model-*.index")):
        print(f"{folder} is there already: -c {folder}")
    elif args.name in PAGES:
        raise UserError(f"{args.name} cannot be fetched by a program: {where_to_get(args.name, args.output)}")
    else:
        raise UserError(f"no published model is called {args.name!r}; there are {', '.join(PAGES)}")


if __name__ == "__main__":
    sys.exit(run(main))
