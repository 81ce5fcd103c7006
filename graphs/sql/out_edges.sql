-- The older name of `outputs_of`.
-- Example: FROM out_edges($graph, $from)
CREATE MACRO out_edges(graph, of_node) AS TABLE
SELECT * FROM outputs_of(graph, of_node);
