"""A remote job for tests: it sums lists of numbers."""

from typing import ClassVar

from mhmoe_ray.errors import DataError, logging_errors
from mhmoe_ray.remote import RemoteJob


class SumRequest(RemoteJob[dict[str, int]]):
    """Request for the sum of each list of `numbers`, by the list's name."""

    module: ClassVar[str] = "tests.cluster.toy_job"
    kind: ClassVar[str] = "sum"
    result_type: ClassVar[type] = dict[str, int]

    numbers: dict[str, list[int]]


def main() -> None:
    """Answer the request of this process; without numbers, log a DataError."""
    request = SumRequest.received()
    with logging_errors():
        if not request.numbers:
            raise DataError("sum", "there are no numbers", "give some")
        print(f"sum: of {len(request.numbers)} lists", flush=True)
        request.answer({name: sum(numbers) for name, numbers in request.numbers.items()})


if __name__ == "__main__":
    main()
