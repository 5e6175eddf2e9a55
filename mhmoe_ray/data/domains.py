"""Names of domains: <source>/<subfolder>, for example redpajama/book."""


def source_of(domain: str) -> str:
    return domain.partition("/")[0]


def subfolder_of(domain: str) -> str:
    return domain.partition("/")[2]
