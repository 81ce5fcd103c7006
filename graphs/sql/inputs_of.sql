-- The edges that end at a node, strongest first. `share` is the part of the node's whole input that an edge brings (see
-- `input_share`); the other columns describe the source.
-- Example: FROM inputs_of($graph, $to)
CREATE MACRO inputs_of(graph, of_node) AS TABLE
SELECT
    e.graph_id, e.source, e.target, e.weight,
    input_share(e.weight, sum(abs(e.weight)) OVER (), t.input_size) AS share,
    n.kind, n.layer, n.position, n.feature, n.token, n.word, n.activation, n.influence, n.label
FROM edges AS e
JOIN nodes AS n ON n.graph_id = e.graph_id AND n.node = e.source
JOIN nodes AS t ON t.graph_id = e.graph_id AND t.node = e.target
WHERE e.graph_id = graph AND n.graph_id = graph AND t.graph_id = graph AND e.target = of_node
ORDER BY abs(e.weight) DESC, e.source;
