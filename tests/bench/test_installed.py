from mhmoe_ray.bench.timing import installed_contestants


def test_contestants_without_package_are_reported():
    lines = []
    assert installed_contestants({"ours": None, "theirs": "no_such_package", "torch's": "torch"}, lines.append) == [
        "ours",
        "torch's",
    ]
    assert lines == ["theirs is not measured: no_such_package is not installed"]
