-- Two graphs node by node, aligned from the ends of their prompts: what only one has, and what both have with both
-- values. `place` is the position counted from the end, where the last token is -1. Features are the same by layer,
-- number, place and transcoder, errors by layer and place, tokens by place, logits by their token: its number, too, if
-- it has one.
-- Example: FROM diff($graph, $other) WHERE kind = 'feature'
CREATE MACRO diff(a, b) AS TABLE
WITH sides AS MATERIALIZED (
    SELECT n.*, n.position - len(i.tokens) AS place,
        CASE n.kind
            WHEN 'token' THEN format('token {}', n.position - len(i.tokens))
            WHEN 'logit' THEN format(
                'logit {} {} {} {} {}', coalesce(n.token, ''), coalesce(n.token_id, -1), n.layer,
                coalesce(n.feature, -1), n.position - len(i.tokens)
            )
            WHEN 'feature' THEN format(
                'feature {} {} {} {} {}', n.layer, n.feature, n.position - len(i.tokens), i.transcoder,
                i.transcoder_revision
            )
            ELSE format('{} {} {} {}', n.kind, n.layer, coalesce(n.feature, -1), n.position - len(i.tokens))
        END AS same
    FROM nodes AS n JOIN graphs AS i ON i.graph_id = n.graph_id
    WHERE n.graph_id IN (a, b)
),
lefts AS (FROM sides AS s WHERE s.graph_id = a),
rights AS (FROM sides AS s WHERE s.graph_id = b)
SELECT
    CASE WHEN r.node IS NULL THEN 'only a' WHEN l.node IS NULL THEN 'only b' ELSE 'both' END AS present,
    coalesce(l.kind, r.kind) AS kind, coalesce(l.layer, r.layer) AS layer, coalesce(l.place, r.place) AS place,
    coalesce(l.feature, r.feature) AS feature, coalesce(l.label, r.label) AS label,
    l.node AS node_a, r.node AS node_b, l.token AS token_a, r.token AS token_b,
    l.activation AS activation_a, r.activation AS activation_b,
    l.influence AS influence_a, r.influence AS influence_b,
    l.probability AS probability_a, r.probability AS probability_b
FROM lefts AS l FULL JOIN rights AS r ON l.same = r.same
ORDER BY greatest(coalesce(l.influence, 0), coalesce(r.influence, 0)) DESC, kind, layer, place, feature;
