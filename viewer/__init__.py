"""Local web pages over a store of graphs: a library, and an explorer of one graph. Never imports torch."""
