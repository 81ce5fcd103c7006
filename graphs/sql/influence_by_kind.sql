-- How the influence on the targets is shared out over the kinds of nodes, in one graph or with NULL in each. `share` is
-- the kind's part of the graph's influence.
-- Example: FROM influence_by_kind($graph)
CREATE MACRO influence_by_kind(graph) AS TABLE
SELECT
    n.graph_id, n.kind, count(*) AS nodes, sum(n.influence) AS influence,
    sum(n.influence) / nullif(sum(sum(n.influence)) OVER (PARTITION BY n.graph_id), 0) AS share
FROM nodes AS n
WHERE (graph IS NULL OR n.graph_id = graph) AND n.kind <> 'logit'
GROUP BY n.graph_id, n.kind
ORDER BY n.graph_id, influence DESC;
