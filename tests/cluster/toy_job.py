"""A remote job for tests: it sums lists of numbers."""

from typing import ClassVar

from mhmoe_ray.errors import DataError
from mhmoe_ray.remote import RemoteJob


class SumRequest(RemoteJob[dict[str, int]]):
    """Request for the sum of each list of `numbers`, by the list's name."""

    module: ClassVar[str] = "tests.cluster.toy_job"
    kind: ClassVar[str] = "sum"
    result_type: ClassVar[type] = dict[str, int]

    numbers: dict[str, list[int]]

    def execute(self) -> None:
        """Answer the request; without numbers, log a DataError."""
        if not self.numbers:
            raise DataError("sum", "there are no numbers", "give some")
        self.print_line(f"of {len(self.numbers)} lists")
        self.answer({name: sum(numbers) for name, numbers in self.numbers.items()})


if __name__ == "__main__":
    SumRequest.main()
