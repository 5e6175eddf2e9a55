"""Surveys of raw data without Ray, which read one file after another."""

from collections import Counter

import numpy as np

from mhmoe_ray.data.inspect.copies import ENTRY_DTYPE, count_copies
from mhmoe_ray.data.inspect.figures import DomainSurvey, histogram_bin
from mhmoe_ray.data.inspect.result import Survey
from mhmoe_ray.data.inspect.survey import survey_file
from mhmoe_ray.data.sources import find_files


def survey_serially(spec, tokenizer=None, rules=True) -> Survey:
    """Return the survey of a data section; `tokenizer` is a tokenizer file, or None for a survey without tokens."""
    files, entries = find_files(spec), [np.empty(0, ENTRY_DTYPE)]
    result = Survey(tokenized=tokenizer is not None)
    for file_index, file in enumerate(files):
        for item in survey_file(file_index, file, spec, tokenizer, rules):
            if isinstance(item, DomainSurvey):
                result.domains.setdefault(file.domain, DomainSurvey())
                result.domains[file.domain] += item
            else:
                entries.append(item)
    result.copies = count_copies(np.concatenate(entries), [f.domain for f in files], [f.path for f in files])
    result.domains = dict(sorted(result.domains.items()))
    return result


def make_histogram(lengths) -> Counter[int]:
    return Counter(map(histogram_bin, lengths))
