"""The highest resident memory of this process and its children while something runs."""

import threading
from pathlib import Path


class MemoryWatch:
    """Looks every 5 ms. `rise` is what came on top of the start, in bytes."""

    def __enter__(self) -> None:
        self.start = self.peak = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, self.now())

    @property
    def rise(self) -> int:
        return self.peak - self.start

    @staticmethod
    def now() -> int:
        children = Path("/proc/self/task").glob("*/children")
        pids = ["self", *(pid for file in children for pid in words(file))]
        return sum(int(pages[1]) for pid in pids if (pages := words(Path(f"/proc/{pid}/statm")))) * 4096


def words(file: Path) -> list[str]:
    """Nothing where a thread or a child has ended since it was listed."""
    try:
        return file.read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
