"""Rows of parquet and arrow files: the one place that needs pyarrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH = 256


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet file, or of an .arrow file as Hugging Face's save_to_disk writes them. Only a batch is held at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} is a table and pyarrow is not installed; run: pip install 'qvl[parquet]'") from None
    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=BATCH):
                    yield from batch.to_pylist()
            return
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:  # the file form has a head and a foot of its own
                reader = pyarrow.ipc.open_file(source)
                reader = (reader.get_batch(i) for i in range(reader.num_record_batches))
            for batch in reader:
                for start in range(0, batch.num_rows, BATCH):
                    yield from batch.slice(start, BATCH).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no readable table: {str(error).splitlines()[0]}") from error
