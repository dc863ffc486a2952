"""One file per model family: the only place that knows how a family is built."""
