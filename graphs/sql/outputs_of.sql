-- The edges that start at a node, strongest share first. `share` is the part of the target's whole input that an edge
-- brings (see `input_share`); the other columns describe the target.
-- Example: FROM outputs_of($graph, $from)
CREATE MACRO outputs_of(graph, of_node) AS TABLE
WITH received AS (
    SELECT e.target, sum(abs(e.weight)) AS total FROM edges AS e WHERE e.graph_id = graph GROUP BY e.target
)
SELECT
    e.graph_id, e.source, e.target, e.weight,
    input_share(e.weight, r.total, n.input_size) AS share,
    n.kind, n.layer, n.position, n.feature, n.token, n.word, n.activation, n.influence, n.label
FROM edges AS e
JOIN received AS r ON r.target = e.target
JOIN nodes AS n ON n.graph_id = e.graph_id AND n.node = e.target
WHERE e.graph_id = graph AND n.graph_id = graph AND e.source = of_node
ORDER BY share DESC, e.target;
