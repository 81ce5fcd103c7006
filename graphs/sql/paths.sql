-- The k strongest paths between two nodes of a graph, strongest first, and fewer if there are not as many. `strength` is
-- the part of the last node's whole input that came along the path: the product of `input_share` over its edges. No
-- error nodes lie between the ends.
-- Example: FROM paths($graph, $from, $to, 10)
CREATE MACRO paths(graph, from_node, to_node, k) AS TABLE
WITH RECURSIVE
every AS MATERIALIZED (
    SELECT n.node, n.kind, n.layer, n.feature, n.token, n.word, n.label, n.input_size
    FROM nodes AS n WHERE n.graph_id = graph
),
shares AS (
    SELECT e.source, e.target,
        input_share(e.weight, sum(abs(e.weight)) OVER (PARTITION BY e.target), t.input_size) AS share
    FROM edges AS e JOIN every AS t ON t.node = e.target
    WHERE e.graph_id = graph AND e.target <= to_node
),
steps AS MATERIALIZED (
    SELECT s.source, s.target, s.share
    FROM shares AS s JOIN every AS n ON n.node = s.source
    WHERE s.share > 0 AND s.source >= from_node AND (n.kind <> 'error' OR n.node = from_node)
),
-- from the last node down: per node the k best ways found so far, passed on whenever they improve. A way that was
-- passed on once stays true, so ways are only ever added, and the best k of them kept.
ways(node, best) USING KEY (node) AS (
    SELECT n.node, [{'strength': 1.0::DOUBLE, 'nodes': [n.node]}] FROM every AS n WHERE n.node = to_node
    UNION
    SELECT m.node, m.ways[:k] AS best
    FROM (
        SELECT s.source AS node, any_value(known.best) AS before,
            list_reverse_sort(list_distinct(flatten(list(list_transform(
                w.best, lambda way: {'strength': way.strength * s.share, 'nodes': list_prepend(s.source, way.nodes)}
            ))) || coalesce(any_value(known.best), []))) AS ways
        FROM ways AS w
        JOIN steps AS s ON s.target = w.node
        LEFT JOIN recurring.ways AS known ON known.node = s.source
        GROUP BY s.source
    ) AS m
    WHERE m.ways[:k] IS DISTINCT FROM m.before
),
found AS (
    SELECT unnest(w.best) AS way, generate_subscripts(w.best, 1) AS rank
    FROM ways AS w
    WHERE w.node = from_node AND from_node::INTEGER < to_node::INTEGER
)
SELECT
    graph AS graph_id, f.rank, f.way.strength AS strength,
    string_agg(node_text(n.kind, n.word, n.token, n.label, n.layer, n.feature), ' → ' ORDER BY n.node) AS path,
    f.way.nodes AS nodes
FROM found AS f JOIN every AS n ON list_contains(f.way.nodes, n.node)
GROUP BY ALL
ORDER BY f.rank;
