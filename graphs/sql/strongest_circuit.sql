-- As `strongest_path`, but through one feature at least: what attention brings from the word to the answer at once does
-- not count, as in the circuit that `trace` prints.
-- Example: SELECT prompt, answer, path FROM strongest_circuit('Dallas')
CREATE MACRO strongest_circuit(from_word) AS TABLE
SELECT b.graph_id, b.prompt, b.answer, b.strength, b.path, b.nodes
FROM best_paths(from_word, NULL, NULL, NULL, false) AS b
ORDER BY b.strength DESC, b.graph_id;
