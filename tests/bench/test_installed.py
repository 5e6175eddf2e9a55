from mhmoe_ray.bench.timing import there


def test_contestants_whose_package_is_not_installed_are_told_of():
    told = []
    assert there({"ours": None, "theirs": "no_such_package", "torch's": "torch"}, told.append) == ["ours", "torch's"]
    assert told == ["theirs is not measured: no_such_package is not installed"]
