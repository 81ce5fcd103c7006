-- The older name of `inputs_of`.
-- Example: FROM in_edges($graph, $to)
CREATE MACRO in_edges(graph, of_node) AS TABLE
SELECT * FROM inputs_of(graph, of_node);
