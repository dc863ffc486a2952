"""Caption files: which column was found, and what is refused."""

from pathlib import Path

import pytest

from toolkit.captions import load_captions
from toolkit.errors import UserError


@pytest.mark.parametrize(
    ("name", "text", "texts", "column"),
    [
        ("a.txt", "a red boat\r\n\n  two cats \n", ("a red boat", "two cats"), "line"),
        ("a.csv", "image_id,source,prompt,seed\n7,x,A boat.,1\n8,x,A cat.,2\n", ("A boat.", "A cat."), "prompt"),
        ("a.csv", ',case_number,prompt,artist\n0,0,"A field, with ""trees""",x\n', ('A field, with "trees"',), "prompt"),
        ("a.csv", "Caption\na boat\n\na cat\n", ("a boat", "a cat"), "Caption"),
        ("a.csv", "text,caption\nno,a boat\n", ("a boat",), "caption"),
        ("a.CSV", '\ufeffprompt\n"a boat\non a lake"\n', ("a boat\non a lake",), "prompt"),
        ("a.jsonl", '{"file_name": "a.png", "text": "a boat"}\n\n{"text": "un \u2028chat"}\n', ("a boat", "un \u2028chat"), "text"),
    ],
)
def test_captions_are_found_and_it_is_said_where(tmp_path: Path, name: str, text: str, texts: tuple[str, ...], column: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    found = load_captions(tmp_path / name)
    assert (found.texts, found.column) == (texts, column)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"x", "no .txt, .csv or .jsonl file"),
        ("a.txt", b"\n \n", "no caption in"),
        ("a.csv", b"prompt\n", "no caption in"),
        ("a.csv", b"id,title\n1,a boat\n", "its columns are 'id', 'title', needs one of prompt, caption"),
        ("a.csv", b"id,prompt\n1\n", "row 1 has no text in column 'prompt'"),
        ("a.csv", b'prompt\n"a boat\n', "unexpected end"),
        ("a.txt", b"\xff\xfe", "cannot read captions"),
        ("a.jsonl", b'{"text": 3}\n', "row 1 has no text"),
        ("a.jsonl", b'["a boat"]\n', "a line is no JSON object"),
        ("a.jsonl", b"a boat\n", "cannot read captions"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_captions(tmp_path / name)
    assert "\n" not in str(error.value)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read captions from .*No such file"):
        load_captions(tmp_path / "a.txt")
