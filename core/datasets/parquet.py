"""The process that unpacks a Parquet file: its header may say less than comes out of it, so its memory has a limit.

It reads the file from its standard input and writes batches of rows, as an Arrow stream, to its standard output. What
is wrong with the file goes to its standard error, as `{"message": …, "field": …}`.
"""

import json
import os
import resource
import sys
from contextlib import suppress
from typing import Any

MAX_MEMORY_BYTES = 3 * 1024**3  # of addresses, some of which the libraries take
MAX_ROW_GROUP_BYTES = 1024**3
MAX_CHUNK_VALUES = 50_000_000  # of one column in a row group: equal ones take next to nothing until they are read
LARGEST_NUMBER = 64  # bytes: a decimal
FIXED = "FIXED_LEN_BYTE_ARRAY"
BATCH_ROWS = 1024
TOO_LARGE = "the file unpacks to more than fits into memory; write it with smaller row groups"


def find_problem(facts: Any) -> tuple[str, str] | None:
    """Returns what in a file's header rules it out, and the column; `facts` is a `pyarrow.parquet.FileMetaData`."""
    groups = [facts.row_group(index) for index in range(facts.num_row_groups)]
    if max((group.total_byte_size for group in groups), default=0) > MAX_ROW_GROUP_BYTES:
        return "a row group is larger than 1 GiB; write the file with smaller row groups", ""
    counts = (group.column(index).num_values for group in groups for index in range(group.num_columns))
    if max(counts, default=0) > MAX_CHUNK_VALUES:
        return f"a column has more than {MAX_CHUNK_VALUES:,} values in a row group; write less", ""
    leaves = [facts.schema.column(index) for index in range(facts.num_columns)]
    wide = [leaf.path for leaf in leaves if leaf.physical_type == FIXED and leaf.length > LARGEST_NUMBER]
    if wide:  # equal ones, too, take all of their bytes once they are read
        return f"values of a fixed size have more than {LARGEST_NUMBER} bytes; write the column as strings", wide[0]
    return None


def unpack() -> tuple[str, str] | None:
    """Writes the rows; returns what is wrong with the file, and with which column."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with os.fdopen(0, "rb") as source, os.fdopen(1, "wb") as sink:
        facts = ParquetFile(source).metadata
        problem = find_problem(facts)
        if problem:
            return problem
        leaves = [facts.schema.column(index) for index in range(facts.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        table = ParquetFile(source, read_dictionary=texts)  # so that a value that all rows share is there once
        stream = None
        for batch in table.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
            stream = stream or pyarrow.ipc.new_stream(sink, batch.schema)
            stream.write_batch(batch)
        if stream:
            stream.close()
    return None


def main() -> int:
    """Ends with 0, or with 1 where something is wrong with the file."""
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        problem = unpack()
    except BrokenPipeError:  # who reads has enough
        return 0
    except MemoryError:
        problem = TOO_LARGE, ""
    except Exception as error:  # pyarrow raises its own types, OSError, ValueError and more
        problem = f"malformed Parquet: {str(error).splitlines()[0][:200]}", ""
    if problem is None:
        return 0
    json.dump({"message": problem[0], "field": problem[1]}, sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
