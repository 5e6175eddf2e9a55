"""A kind of remote job in one file: the request, the work, the result."""

from typing import ClassVar

from mhmoe_ray.errors import DataError, logging_errors
from mhmoe_ray.remote import RemoteJob


class SumRequest(RemoteJob[dict[str, int]]):
    module: ClassVar[str] = "tests.cluster.toy_job"
    kind: ClassVar[str] = "sum"
    result_type: ClassVar[type] = dict[str, int]

    numbers: dict[str, list[int]]


def main() -> None:
    request = SumRequest.received()
    with logging_errors():
        if not request.numbers:
            raise DataError("sum", "there are no numbers", "give some")
        print(f"sum: of {len(request.numbers)} lists", flush=True)
        request.answer({name: sum(numbers) for name, numbers in request.numbers.items()})


if __name__ == "__main__":
    main()
