"""Atomic files and directories, the lock, digests; and tables read with types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adafuse_jax.core.atomic_files import check_digests, locked, new_directory, new_file, write_digests, write_json
from adafuse_jax.core.errors import MAX_MESSAGE, UserError, quoted
from adafuse_jax.core.tables import MAX_DEPTH, Table, parse_table, read_json, read_text


class TestAtomic:
    def test_a_file_appears_at_the_end_and_leaves_nothing_else(self, tmp_path: Path):
        path = tmp_path / "a.json"
        with new_file(path) as file:
            file.write("{}")
            assert not path.exists()
        assert path.read_text() == "{}"
        assert os.listdir(tmp_path) == ["a.json"]

    def test_of_a_symbolic_link_the_target_is_written(self, tmp_path: Path):
        (tmp_path / "link").symlink_to("target")
        write_json(tmp_path / "link", {})
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text() == "{}\n"

    def test_a_device_and_a_pipe_are_not_replaced(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe")
        for path in (Path("/dev/null"), tmp_path / "pipe", tmp_path):
            with pytest.raises(UserError, match="not a regular file"):
                write_json(path, {})
        assert not Path("/dev/null").is_file()
        assert os.listdir(tmp_path) == ["pipe"]

    def test_an_exception_leaves_the_old_file(self, tmp_path: Path):
        path = tmp_path / "a.json"
        write_json(path, {"old": 1})
        with pytest.raises(KeyError), new_file(path) as file:
            file.write({}["new"])
        assert json.loads(path.read_text()) == {"old": 1}
        assert os.listdir(tmp_path) == ["a.json"]

    @pytest.mark.parametrize("neighbour", ["out.partial", "out.old", "out.new", ".out.partial", ".out.old"])
    def test_replacing_a_directory_touches_no_neighbour(self, tmp_path: Path, neighbour: str):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "precious").write_text("mine")
        for content in ("first", "second"):
            with new_directory(tmp_path / "out", replace=True) as partial:
                (partial / "file").write_text(content)
        assert (tmp_path / "out" / "file").read_text() == "second"
        assert (tmp_path / neighbour / "precious").read_text() == "mine"
        assert sorted(os.listdir(tmp_path)) == sorted(["out", neighbour])

    def test_a_directory_in_use_is_refused_before_anything_is_written(self, tmp_path: Path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        with pytest.raises(UserError, match="not an empty directory"), new_directory(tmp_path / "out"):
            pytest.fail("entered")
        assert os.listdir(tmp_path) == ["out"]

    def test_what_others_put_into_a_replaced_directory_stays(self, tmp_path: Path):
        out = tmp_path / "out"
        for content in ("first", "second"):
            with new_directory(out, replace=True, keep_others=True) as partial:
                (partial / "file").write_text(content)
            (out / "notes.txt").write_text("mine")
            (out / "more").mkdir(exist_ok=True)
            (out / "more" / "x").write_text("mine, too")
        with new_directory(out, replace=True, keep_others=True) as partial:
            (partial / "file").write_text("third")
        assert {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()} == {
            "file": "third", "notes.txt": "mine", "more/x": "mine, too"
        }  # fmt: skip
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("replace", [False, True])
    def test_of_a_symbolic_link_the_target_directory_is_written(self, tmp_path: Path, replace: bool):
        (tmp_path / "disk" / "target").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
        if replace:
            (tmp_path / "link" / "file").write_text("old")
        with new_directory(tmp_path / "link", replace=replace) as partial:
            (partial / "file").write_text("new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "target" / "file").read_text() == "new"
        assert [os.listdir(tmp_path / "disk"), sorted(os.listdir(tmp_path))] == [["target"], ["disk", "link"]]

    def test_a_failed_directory_leaves_the_old_one(self, tmp_path: Path):
        with new_directory(tmp_path / "out") as partial:
            (partial / "file").write_text("old")
        with pytest.raises(KeyError), new_directory(tmp_path / "out", replace=True) as partial:
            (partial / "file").write_text({}["new"])
        assert (tmp_path / "out" / "file").read_text() == "old"
        assert os.listdir(tmp_path) == ["out"]

    def test_a_directory_filled_meanwhile_is_not_lost(self, tmp_path: Path):
        with pytest.raises(OSError), new_directory(tmp_path / "out"):  # noqa: PT011, PT012
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("x")
        assert (tmp_path / "out" / "theirs").read_text() == "x"

    def test_a_second_process_finds_the_lock_taken(self, tmp_path: Path):
        code = (
            "import sys; from pathlib import Path; from adafuse_jax.core.atomic_files import locked\n"
            "with locked(Path(sys.argv[1]), what='--output x'): print('held')"
        )
        run = lambda: subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)  # noqa: E731
        with locked(tmp_path, what="--output x"):
            assert "another process is using it" in run().stderr
        assert run().stdout == "held\n"


class TestDigests:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner" / "array").write_bytes(bytes(range(256)))
        (tmp_path / "metadata").write_text("{}")
        write_digests(tmp_path)
        return tmp_path

    def test_untouched_files_pass(self, directory: Path):
        check_digests(directory)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda d: (d / "inner" / "array").write_bytes(bytes(range(255)) + b"\0"), "other bytes"),
            (lambda d: (d / "inner" / "array").write_bytes(b""), "other bytes"),
            (lambda d: (d / "inner" / "array").unlink(), "is missing"),
            (lambda d: (d / "inner" / "more").write_bytes(b"x"), "not among"),
            (lambda d: (d / "digests.json").unlink(), "cannot be read"),
            (lambda d: (d / "digests.json").write_text("["), "not valid JSON"),
        ],
    )
    def test_damage_is_found(self, directory: Path, damage, message: str):
        damage(directory)
        with pytest.raises(UserError, match=message):
            check_digests(directory)


class TestTables:
    def test_a_byte_order_mark_is_no_part_of_the_text(self, tmp_path: Path):
        (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}')
        assert read_json(tmp_path / "a") == {"a": 1}

    def test_a_fifo_does_not_hang(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError) as error:
            read_text(tmp_path / "pipe")
        assert str(error.value) == f"{tmp_path}/pipe: is not a regular file; restore the file"

    @pytest.mark.parametrize("name", ["a\0b", "x" * 300, "missing"])
    def test_a_name_that_no_file_has(self, tmp_path: Path, name: str):
        with pytest.raises(UserError, match="cannot be read"):
            read_text(tmp_path / name)

    @pytest.mark.parametrize(
        ("suffix", "text"),
        [(".json", '{"a": 1, "b": {"c": 1, "c": 1}}'), (".yaml", "c: 1\nc: 2\n"), (".toml", "c = 1\nc = 2\n")],
    )
    def test_of_a_key_that_is_there_twice_neither_value_is_taken(self, suffix: str, text: str):
        with pytest.raises(UserError, match=r"^f: not valid .*(twice|overwrite).*; correct the file$"):
            parse_table(text, suffix, "f", unique=True)

    @pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 100_000])
    def test_deep_nesting_is_refused(self, depth: int):
        text = '{"a": ' + "[" * depth + "]" * depth + "}"
        with pytest.raises(UserError, match=r"nested (deeper|too deeply)"):
            parse_table(text, ".json", "config.json")

    @pytest.mark.parametrize(
        ("suffix", "text"), [(".json", "[1]"), (".json", "{"), (".yaml", "a: ["), (".yml", "- 1"), (".toml", "a = ")]
    )
    def test_what_is_no_table_is_refused(self, suffix: str, text: str):
        with pytest.raises(UserError, match=r"^where: "):
            parse_table(text, suffix, "where")

    @pytest.mark.parametrize("value", [True, 1.5, "2", -1, 2**31, 10**400, float("nan"), [], {}])
    def test_what_is_no_integer_in_range(self, value):
        with pytest.raises(UserError, match=r"f: n is .*; it must be an integer from 0 to 2147483647"):
            Table({"n": value}, "f").integer("n")

    @pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), 10**400, 0, -1])
    def test_what_is_no_positive_number(self, value):
        with pytest.raises(UserError, match=r"f: x is .*; it must be a finite number, greater than 0"):
            Table({"x": value}, "f").number("x", low=0, above=True)

    def test_null_is_absence(self):
        table = Table({"n": None}, "f")
        assert table.integer("n", None) is None
        assert table.number("n", 2.0) == 2.0
        with pytest.raises(UserError, match="f: n is missing"):
            table.integer("n")

    def test_keys_that_nobody_asked_for(self):
        table = Table({"a": 1, "b": 2, "c": None}, "f")
        table.integer("a")
        assert table.unread() == ["b"]

    def test_messages_are_one_short_line(self):
        with pytest.raises(UserError) as raised:
            Table({"n": "x\n\x1b[31m" * 100_000}, "f" * 10_000).integer("n")
        message = str(raised.value)
        assert len(message) <= MAX_MESSAGE
        assert message.isprintable()
        assert len(quoted(10**5000)) < 60
