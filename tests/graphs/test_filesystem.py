import os
import threading
from contextlib import suppress
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graphs.filesystem import ReadOnlyFiles


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(256)) * 4000)
    return ReadOnlyFiles({"numbers": path})


def test_files_are_read_under_their_names_and_nothing_else_is_there(files, tmp_path):
    with_protocol = files.open("store://numbers")
    assert (with_protocol.seek(-2, 2), with_protocol.read()) == (1_023_998, b"\xfe\xff")
    assert (files.open("numbers").read(3), files.info("numbers")["size"]) == (b"\0\1\2", 1_024_000)
    assert (files.exists("numbers"), files.exists("other"), files.isdir("")) == (True, False, False)
    assert files.glob("numbers") == ["numbers"]
    assert files.glob("*") == []
    for path in ("other", str(tmp_path / "numbers"), "../numbers"):
        with pytest.raises(FileNotFoundError):
            files.open(path)


@pytest.mark.parametrize("mode", ["wb", "ab", "r+b", "xb", "w"])
def test_nothing_is_opened_for_writing(files, mode):
    with pytest.raises(PermissionError, match="can only be read"):
        files.open("numbers", mode)


def test_files_are_not_listed(files):
    with pytest.raises(PermissionError, match="are not listed"):
        files.ls("")


def test_threads_that_seek_and_read_in_one_handle_do_not_disturb_each_other(files):
    file, wrong = files.open("numbers"), []

    def read(start):
        for place in range(start, 200_000, 101):
            file.seek(place)
            if file.read(1) != bytes([place % 256]):
                wrong.append(place)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert wrong == []


def open_files():
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of one that was closed just now
            found.append(os.readlink(link))
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are not listed")
def test_duckdb_reads_with_several_threads_what_arrow_wrote(tmp_path):
    table = pa.table({"text": [f"text {i % 1000}" for i in range(200_000)], "number": range(200_000)})
    pq.write_table(table, tmp_path / "table", row_group_size=5_000)
    with duckdb.connect(":memory:", config={"threads": 4}) as connection:
        connection.register_filesystem(ReadOnlyFiles({"t.parquet": tmp_path / "table"}))
        query = "SELECT count(DISTINCT text), sum(number) FROM read_parquet('store://t.parquet')"
        assert connection.sql(query).fetchall() == [(1000, 19_999_900_000)]
        assert not [link for link in open_files() if link.endswith("/table")]
        with pytest.raises(duckdb.Error, match="can only be read"):
            connection.execute("COPY (SELECT 1) TO 'store://t.parquet' (USE_TMP_FILE false, FORMAT parquet)")
