-- In every graph of a prompt with this word: the strongest path from the word to the most probable logit, as
-- "Dallas → Texas (L2 Dallas) → say Austin (L5 is) → Austin". `strength` is the part of the logit's whole input that
-- came along the path: the product of `input_share` over its edges. Paths through error nodes do not count.
-- Example: SELECT answer, strength, path FROM strongest_path('Dallas')
CREATE MACRO strongest_path(from_word) AS TABLE
SELECT b.graph_id, b.prompt, b.answer, b.strength, b.path, b.nodes
FROM best_paths(from_word, NULL, NULL, NULL, true) AS b
ORDER BY b.strength DESC, b.graph_id;
