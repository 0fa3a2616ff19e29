"""Fitting a table into any width, and text that is safe to show."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from keepstep.cli.columns import Column, fit, render, render_pairs, wrapped
from keepstep.cli.metrics import direction_of
from keepstep.cli.output import Cell, Plain
from keepstep.cli.phrasing import human_bytes, printable

texts = st.text(max_size=30)
columns = st.lists(
    st.builds(
        Column,
        header=texts,
        cells=st.lists(st.builds(Cell, texts), min_size=2, max_size=2),
        right=st.booleans(),
        rank=st.integers(0, 5),
        least=st.none() | st.integers(3, 10),
    ),
    min_size=1,
    max_size=6,
)


class Narrow(Plain):
    """A terminal without colours."""

    def __init__(self, width: int) -> None:
        self.width = width


@given(columns=columns, width=st.integers(1, 100))
def test_a_fitted_table_is_never_wider_than_the_terminal(columns: list[Column], width: int) -> None:
    lines = list(render(fit(columns, width), Narrow(width)))
    assert all(cell_len(line) <= width for line in lines)
    assert all(line.isprintable() for line in lines)


def test_a_column_gives_up_no_more_than_is_needed() -> None:
    soft = Column(header="a", cells=[Cell("x" * 30)], least=10)
    assert [width for _, width in fit([soft], 25).columns] == [25]


@given(columns=columns)
def test_without_a_width_every_text_is_whole(columns: list[Column]) -> None:
    lines = list(render(fit(columns, None), Plain()))
    assert len(lines) == 3
    for column in columns:
        for line, cell in zip(lines[1:], column.cells, strict=True):
            assert cell.text.rstrip(" ") in line


@given(text=texts, width=st.integers(14, 60), indent=st.integers(0, 6))
def test_wrapped_text_fits_and_loses_nothing_but_spaces(text: str, width: int, indent: int) -> None:
    lines = list(wrapped(Cell(text), Narrow(width), indent))
    assert all(cell_len(line) <= width for line in lines)
    assert "".join("".join(lines).split(" ")) == "".join(printable(text).split(" "))


def test_pairs_stand_below_each_other() -> None:
    pairs = [("a", Cell("1")), ("long", Cell("2"))]
    assert list(render_pairs(pairs, Plain(), indent=2)) == ["  a     1", "  long  2"]


@given(text=st.text())
def test_what_is_printed_is_printable(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)


def test_sizes_have_three_digits() -> None:
    sizes = [0, 999, 1000, 9994, 9996, 99_960, 999_499, 999_500, 7_167_128, 10**15, 10**19]
    assert [human_bytes(size) for size in sizes] == [
        "0 B", "999 B", "1.00 kB", "9.99 kB", "10.0 kB", "100 kB", "999 kB", "1.00 MB", "7.17 MB", "1.00 PB",
        "10000 PB",
    ]  # fmt: skip


def test_the_name_of_a_metric_tells_which_way_is_better() -> None:
    smaller = ["loss", "val_loss", "eval/loss", "ppl", "train-CE", "rmse", "wer"]
    larger = ["acc", "top1_acc", "acc1", "accuracy", "f1", "macro.F1", "mAP50", "r2", "bleu4"]
    unknown = ["lr", "step_time", "loss_accuracy", "", "glossary"]
    assert {direction_of(name) for name in smaller} == {"min"}
    assert {direction_of(name) for name in larger} == {"max"}
    assert {direction_of(name) for name in unknown} == {None}
