"""Sources of a recipe that are read while they are trained on."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from gemma_ft.build.located import located_rows
from gemma_ft.build.sources import Described, chunks_of
from gemma_ft.data.conversation import Item, Pair
from gemma_ft.data.pack.stream import Arranging, Stream, StreamSource
from gemma_ft.data.pack.streamed import StreamedExamples
from gemma_ft.data.read.files import files_at, find_files
from gemma_ft.recipe.schema import Recipe, Source
from gemma_ft.system.row_kind import DOCUMENTS_OF


def streamed_examples(
    recipe: Recipe, described: Sequence[Described], held_out: Sequence[Item | Pair]
) -> StreamedExamples:
    """The examples of a run over streamed rows, of which the first block is read. `described`: how each source is read.
    Training rows that are held-out rows too are left out, unless eval.overlap allows them.

    Raises: DataError.
    """
    data, batch = recipe.data, recipe.train.global_batch_size
    refused = held_out if recipe.eval.overlap == "error" else []
    sizes = [_bytes_of(source) for source in data.train]
    known = None not in sizes and all(sizes)
    rates = [
        source.weight or (float(size or 0) if known else 1.0) * source.repeats
        for source, size in zip(data.train, sizes, strict=True)
    ]
    sources = zip(data.train, described, rates, strict=True)
    stream = Stream(
        [_stream_source(source, how, rate / sum(rates)) for source, how, rate in sources],
        Arranging(data.max_seq_len, data.packing, data.too_long),
        recipe.seed,
        frozenset(described[0].reading.encoder.content_hash(item) for item in refused),
        skip_bad_rows=data.on_bad_row == "skip",
    )
    assert recipe.train.max_steps is not None, "the recipe is checked"
    return StreamedExamples(stream, total=recipe.train.max_steps * batch, behind=2 * batch)


def _bytes_of(source: Source) -> int | None:
    """The size of a source, where its files tell. Sources without weights are read at such rates that they end
    together; where one size is unknown, all alike.
    """
    sizes = [file.bytes for file in files_at(located_rows(source.path), source.split) or ()]
    return sum(size or 0 for size in sizes) if sizes and None not in sizes else None


def _stream_source(source: Source, how: Described, rate: float) -> StreamSource:
    files = find_files(located_rows(source.path), source.split)
    return StreamSource(
        name=source.path,
        chunks=functools.partial(chunks_of, source, streaming=True),
        reading=how.reading,
        most=source.max_rows and source.max_rows * DOCUMENTS_OF[how.reading.rows],
        repeats=source.repeats,
        rate=rate,
        endless=source.weight is not None,
        split=source.split if files is not None and files.parted else None,
    )
