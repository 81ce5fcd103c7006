-- The strongest path between two nodes of a graph, with the columns of `strongest_path`: `strength` is the part of
-- the last node's whole input that came along it. No error nodes lie between the ends.
-- Example: FROM paths_between($graph, $from, $to)
CREATE MACRO paths_between(graph, from_node, to_node) AS TABLE
SELECT b.graph_id, b.prompt, b.answer, b.strength, b.path, b.nodes
FROM best_paths(NULL, graph, from_node, to_node, true) AS b
ORDER BY b.strength DESC, b.graph_id;
