import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_util.scans.frame import Frame
from data_util.scans.points import read_points
from errors import UserError

PLACE = [[-10.5, -4.25, -4.5]]
TWO = [[-10.5, -4.25, -4.5], [-12, -6, 2]]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of a table that each test writes anew."""
    return tmp_path_factory.mktemp("points") / "p.csv"


def read(file, text, **options):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_points(file, **options)


def refused(file, text):
    """The message, one line that names the file, with which a table is refused."""
    with pytest.raises(UserError) as error:
        read(file, text)
    message = str(error.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "text",
    [
        "x,y,z\n-10.5,-4.25,-4.5\n",
        "-10.5,-4.25,-4.5\n",
        "-10.5;-4.25;-4.5",
        "-10.5 -4.25  -4.5\r\n",
        " -10.5\t-4.25\t-4.5\n\n\n",
        "\n\nx;y;z\n-10.5;-4.25;-4.5\n  \n",
        "X\tY\tZ\n-10.5\t-4.25\t-4.5\n",
        "z, id, Y, X, note\n\n  \n-4.5, 7, -4.25, -10.5, the tip\n",
        'id;x;y;z\n"tip; of, it";-10.5;-4.25;-4.5\n',
        '"x" "y" "z"\n-1.05e1 -4.25 -.45E+1\n',
        "# x y z\n-10.5 -4.25 -4.5\n",
        ",x,y,z\n0,-10.5,-4.25,-4.5\n",
        "x,y,z,\n-10.5,-4.25,-4.5,\n",
        "x,\ty,\tz\n-10.5,\t-4.25,\t-4.5\n",
        "x,y,z\r\r\n-10.5,-4.25,-4.5\r\r\n",
        "x,y,z\r-10.5,-4.25,-4.5\r",
        b"\xef\xbb\xbfx,y,z\n-10.5,-4.25,-4.5\n",
        b"\xef\xbb\xbf-10.5,-4.25,-4.5\n",
        "x\ty\tz\n-10.5\t-4.25\t-4.5\n".encode("utf-16"),
    ],
)
def test_every_dialect_gives_the_same_landmark(file, text):
    np.testing.assert_array_equal(read(file, text), PLACE)


@pytest.mark.parametrize(
    ("text", "line", "remedy"),
    [
        ("x,y,z\n-10,5,-4,25,-4,5\n", 2, "decimal point"),
        ("x,y,z\n1,-10.5,-4.25,-4.5\n", 2, "name every column in a header such as id,x,y,z"),
        ("1,-10.5,-4.25,-4.5\n2,-12,-6,2\n", 1, "header such as id,x,y,z"),
        ("tip,-10.5,-4.25,-4.5\n", 1, "header such as id,x,y,z"),
        ("x;y;z\n-10,5;-4,25;-4,5\n", 2, "write a decimal point"),
        ("x y z\n-10,5 -4,25 -4,5\n", 2, "write a decimal point"),
        ('x,y,z\n"-10,5","-4,25","-4,5"\n', 2, "write a decimal point"),
        ("-10,5\t-4,25\t-4,5\n", 1, "decimal point"),
        ("x,y,z,,,\n-10,5,-4,25,-4,5\n", 2, "column 4, which has no name"),
        ("x,y,z\n1,2,3\n1;2;3\n", 3, "one cell per column"),
        ("1,2,3\n1,2\n", 2, "without a header a row has three numbers"),
        ("1,2,3\n1,2,3,\n", 2, "has 4 cells"),
        ("1,2,3\nx,y,z\n", 2, "x is 'x', which is no number"),
        ("x,y,z\n1,2,3\n\n4,5,6\n", 3, "is empty; remove it, or write nan"),
        ("x,y,z\n1,,3\n", 2, "has no y; give all three"),
        ("x,y,z\n1,2,inf\n", 2, "z is 'inf'"),
        ("x,y,z\n1,2,1e999\n", 2, "z is '1e999'"),
        ("x,y,z\n1,2,1_000\n", 2, "z is '1_000'"),
        ("x,y,z\n1,2,٣\n", 2, "no number"),
        ('x,y,z\n1,2,"1"0\n', 2, "one cell per column"),
        ("name x y z\nleft lobe 1 2 3\n", 2, "has 5 cells and the header has 4"),
        ("x,y,z,x\n1,2,3,4\n", 1, "two columns x"),
        ("r,a,s\n1,2,3\n", 1, "neither a header with x, y and z nor a row of three numbers"),
        ("# CoordinateSystem = 0\n# columns = id,x,y,z\n1,1,2,3\n", 1, "neither a header"),
        ("1.234,5,2,3\n", 1, "neither a header"),
    ],
)
def test_what_could_be_taken_for_other_numbers_is_refused_with_its_line(file, text, line, remedy):
    message = refused(file, text)
    assert f"line {line}: " in message
    assert remedy in message


@pytest.mark.parametrize(
    "text", ["", "\n \n", ",,\n,,\n", "x,y,z\n", b"\xff\xfe\xff", "x,y,z\nä,1,2\n".encode("latin1")]
)
def test_a_file_without_landmarks_or_without_text_is_refused(file, text):
    assert "landmarks" in refused(file, text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.csv: cannot be read \(No such file"):
        read_points(tmp_path / "gone.csv")


@pytest.mark.parametrize(
    "text", ["x,y,z\n{}\n,,\nnan,NaN,nan\n", "id;x;y;z\n1;{}\n2;;;\n3;;;\n", "{}\n\t\t\n nan\t\tnan\n"]
)
def test_a_landmark_that_is_missing_is_nan(file, text):
    delimiter = next(part for part in ";\t," if part in text)
    points = read(file, text.format(delimiter.join(("-10.5", "-4.25", "-4.5"))))
    np.testing.assert_array_equal(points, [*PLACE, [np.nan] * 3, [np.nan] * 3])


def test_the_space_of_landmarks(file):
    text = "x,y,z\n-10.5,-4.25,-4.5\n-12,-6,2\n,,\n"
    missing = [np.nan] * 3
    np.testing.assert_array_equal(read(file, text), [*TWO, missing])
    np.testing.assert_array_equal(read(file, text, space="ras"), [[10.5, 4.25, -4.5], [12, 6, 2], missing])
    frame = Frame((20, 22, 24), (2, 2.5, 3), (-30, -25, -40), (0, -1, 0, 1, 0, 0, 0, 0, 1))
    voxels = read(file, "x,y,z\n1,2,3\n,,\n", space="voxel", frame=frame)
    np.testing.assert_allclose(voxels, [[-30 - 2 * 2.5, -25 + 1 * 2, -40 + 3 * 3], missing])
    with pytest.raises(UserError, match="need the frame of their scan"):
        read(file, text, space="voxel")
    with pytest.raises(UserError, match="the space is one of lps, ras, voxel"):
        read(file, text, space="mm")


numbers = st.one_of(
    st.floats(-1e4, 1e4).map(repr),
    st.integers(-500, 500).map(str),
    st.decimals(-500, 500, places=2, allow_nan=False).map(lambda value: f"{value:f}"),
)
names = st.text(string.ascii_letters + string.digits + " ,;", min_size=1, max_size=8).filter(str.strip)
blank = st.sampled_from(["", "", " "])


@st.composite
def tables(draw):
    """A sound table: its text and its numbers, as they are written."""
    delimiter = draw(st.sampled_from(["\t", ",", ";", " "]))
    columns = draw(st.permutations(["x", "y", "z", *draw(st.lists(st.sampled_from(["id", "name"]), unique=True))]))
    has_header = len(columns) > 3 or list(columns) != ["x", "y", "z"] or draw(st.booleans())
    rows = draw(st.lists(st.one_of(st.tuples(numbers, numbers, numbers), st.none()), min_size=1, max_size=5))
    may_be_empty = delimiter != " "
    lines = []
    if has_header:
        lines.append([draw(st.sampled_from([name, name.upper()])) for name in columns])
    for row in rows:
        cells = dict(zip("xyz", row or (("",) * 3 if may_be_empty else ("nan",) * 3), strict=True))
        label = "t" if delimiter == " " else f'"{draw(names)}"'
        lines.append([cells.get(column, label) for column in columns])
    if not has_header and rows[0] is None and may_be_empty:
        lines[0] = ["nan"] * 3
    pad = (lambda cell: cell) if delimiter == "\t" else (lambda cell: draw(blank) + cell + draw(blank))
    text = draw(st.sampled_from(["\n", "\r\n"])).join(delimiter.join(map(pad, line)) for line in lines)
    return text + draw(st.sampled_from(["", "\n", "\n\n"])), [row or ("nan",) * 3 for row in rows]


@given(tables())
def test_a_sound_table_gives_its_numbers(file, table):
    text, rows = table
    np.testing.assert_array_equal(read(file, text), np.array(rows, float))


def decimal_comma(text):
    """Whether a number has digits on both sides of its point, so that a comma can stand there."""
    return "." in text and "e" not in text and all(text.lstrip("-").split("."))


@given(
    st.lists(st.tuples(*[numbers.filter(decimal_comma)] * 3), min_size=1, max_size=4),
    st.sampled_from([",", ";", "\t", " "]),
    st.sampled_from([None, ["x", "y", "z"], ["id", "x", "y", "z"], ["x", "y", "z", "name"]]),
    st.sets(st.integers(0, 2), min_size=1),
)
def test_decimal_commas_never_give_other_numbers(file, rows, delimiter, columns, where):
    def cell(name, row):
        value = row["xyz".index(name)] if name in "xyz" else "7"
        return value.replace(".", ",") if name in "xyz" and "xyz".index(name) in where else value

    lines = [delimiter.join(cell(name, row) for name in columns or "xyz") for row in rows]
    header = [] if columns is None else [delimiter.join(columns)]
    refused(file, "\n".join([*header, *lines]))


@given(st.text(string.digits + '.,;- \t\nxyz"e', max_size=40))
def test_what_is_read_stands_in_the_file_and_everything_else_is_refused(file, text):
    file.write_text(text, newline="")
    try:
        points = read_points(file)
    except UserError:
        return
    written = text.replace('"', " ")
    for delimiter in ",;\t\n":
        written = written.replace(delimiter, " ")
    values = {float(cell) for cell in written.split() if _is_number(cell)}
    assert {float(value) for value in points[np.isfinite(points)]} <= values


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
