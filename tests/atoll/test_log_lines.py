"""Lines alike are few, however often something is refused."""

from __future__ import annotations

import logging

from atoll import log_lines
from atoll.log_lines import FewAlike


def test_of_lines_alike_the_first_are_written_then_one_a_second_with_the_number_left_out() -> None:
    now = 0.0
    written: list[str] = []
    log = logging.Logger("refusals")
    handler = logging.Handler()
    handler.emit = lambda record: written.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(FewAlike(at_once=3, each_s=1.0, clock=lambda: now))
    log.addHandler(handler)

    def refuse(number: int) -> None:
        log.info("refused %d: 100%%", number)

    for number in range(10):
        refuse(number)
    assert written == ["refused 0: 100%", "refused 1: 100%", "refused 2: 100%"]
    log.info("something else")
    assert written[-1] == "something else"
    now = 1.0
    refuse(10)
    refuse(11)
    assert written[-1] == "refused 10: 100% (and 7 more like this were left out)"
    now = 100.0
    for number in range(20, 30):
        refuse(number)
    assert len(written) == 8


def test_what_is_remembered_of_statements_is_bounded() -> None:
    few = FewAlike(at_once=1)
    for line in range(log_lines.STATEMENTS_MAX + 10):
        assert few.filter(logging.LogRecord("x", logging.INFO, "file.py", line, "text", (), None))
    assert not few.filter(logging.LogRecord("x", logging.INFO, "file.py", log_lines.STATEMENTS_MAX, "text", (), None))
    assert len(few._seen) == log_lines.STATEMENTS_MAX
